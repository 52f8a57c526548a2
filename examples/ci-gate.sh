#!/usr/bin/env bash
# Fails a build when a quantized pipeline no longer generates images as well as it must.
#
#   ci-gate.sh MODEL BITS MIN_PSNR_DB MAX_LATENT_REL_L2 [options of `edadm evaluate`]
#
# $EDADM_RUN is the run folder, by default ./edadm-run, and $EDADM_CONFIG a configuration file for all stages, by default none.
# Exit codes are those of edadm: 5 when the quality is not reached, 3 for a broken model, 4 for a machine that cannot.
# With 0 and 5, the metrics are in $EDADM_RUN/evaluation.json.
set -euo pipefail

if (($# < 4)); then
  sed -n 's/^#   //p' "$0" >&2
  exit 2
fi
model=$1 bits=$2 min_psnr_db=$3 max_latent_rel_l2=$4
shift 4

# Jobs on one machine must not share a run folder; what a cached one holds is not computed again.
export EDADM_RUN="${EDADM_RUN:-$PWD/edadm-run}"
config=()
if [[ -n ${EDADM_CONFIG:-} ]]; then config=(--config "$EDADM_CONFIG"); fi

edadm collect --model "$model" "${config[@]}" --quiet
edadm select "${config[@]}" --quiet
edadm reconstruct --bits "$bits" "${config[@]}" --quiet
edadm export --bits "$bits" "${config[@]}" --quiet

status=0
edadm evaluate --bits "$bits" "${config[@]}" "$@" --json \
  --require "distance_to_full_precision.psnr_db>=$min_psnr_db" \
  --require "distance_to_full_precision.latent_rel_l2<=$max_latent_rel_l2" \
  >"$EDADM_RUN/evaluation.json" || status=$?

case $status in
  0) echo "The quality of $model at $bits is reached." ;;
  5) echo "The quality of $model at $bits is NOT reached." >&2 ;;
  *) echo "The quality of $model at $bits could not be measured." >&2 ;;
esac
exit "$status"
