"""Runs the stages one by one, and reads the artifact of one of them.

python examples/stage_by_stage.py [MODEL] [RUN]
"""

import sys
from pathlib import Path

from edadm_cli import collect, select
from edadm_cli.artifacts import RunFolder, Selection
from edadm_cli.config import CollectConfig, SelectConfig

model = sys.argv[1] if len(sys.argv) > 1 else "digits-sd"
run_folder = RunFolder(Path(sys.argv[2] if len(sys.argv) > 2 else "runs/example-stages"))

config = CollectConfig(model=model, num_trajectories=8, num_steps=4, batch_size=4)
print(collect.STAGE.estimate(config, run_folder))
collect.STAGE.run(config, run_folder)
select.STAGE.run(SelectConfig(strategy="uniform"), run_folder)

artifact = run_folder.open("select")
print(f"samples per sampler step: {Selection.load(artifact).counts}")
tensors = artifact.tensors("calibration.safetensors", ["sample", "timestep"])
print(f"calibration set {tuple(tensors['sample'].shape)}, identity {artifact.identity[:12]}")
