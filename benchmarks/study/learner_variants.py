"""The variants that `benchmarks/learner.py` compares, in groups.

A variant is a shipped recipe with some fields changed, such as `default+learn.rounding_sharpness=1`; `samples=16` is
the size of the calibration set.
"""

from __future__ import annotations

from dataclasses import dataclass

# The recipe `default` of version 0.1: rounding is decided only when it is hardened, and TDAC's radius is the median.
BEFORE = "default+learn.rounding_sharpness=1+select.density_quantile=0.5"
FEW_ITERATIONS = "+learn.iterations=2500+learn.weight_learning_rate=0.01+learn.activation_learning_rate=0.004"


@dataclass(frozen=True)
class Group:
    """Variants by label, the bit widths at which they run, and the seeds."""

    variants: dict[str, str]
    widths: tuple[str, ...] = ("w4a8",)
    seeds: tuple[int, ...] = (0, 1, 2)


def channels(*kinds: str, base: str = "default") -> str:
    """Returns the variant that learns values per channel of some kinds."""
    names = ",".join(f'"{kind}"' for kind in kinds)
    return f"{base}+learn.channel_values=[{names}]"


INPUT_SCALES = '+transforms=[{"name":"input-channel-scale"}]'
MAIN = {
    "before": BEFORE,
    "default": "default",
    "default, gamma 0": "default+learn.layer_loss_weight=0",
    "thorough, all inputs quantized": "thorough+ranges.float_input_share=0",
    "thorough": "thorough",
    "paper": "paper",
    "ptq4dm": "ptq4dm",
    "rtn": "rtn",
    "ranges-only": "default+learn.granularity=none",
}
PUBLISHED = {
    "q-diffusion, 2,500 iterations": f"q-diffusion{FEW_ITERATIONS}",
    "paper, regularizer 0": "paper+learn.rounding_regularizer=0",
    "paper, tau 1 and regularizer 0": "paper+learn.rounding_sharpness=1+learn.rounding_regularizer=0",
    "paper-uniform-g0": "paper+select.strategy=uniform+learn.layer_loss_weight=0",
}
INGREDIENTS = {
    "weight scales": channels("weight-scale"),
    "biases": channels("bias"),
    "weight scales and biases": channels("weight-scale", "bias"),
    "channel scales by formula": f"default{INPUT_SCALES}",
    "channel scales, learned": channels("input-channel-scale") + INPUT_SCALES,
    "all per channel": channels("weight-scale", "bias", "input-channel-scale") + INPUT_SCALES,
    "all per channel, rate 3e-3": channels("weight-scale", "bias", "input-channel-scale")
    + f"{INPUT_SCALES}+learn.channel_learning_rate=0.003",
    "all per channel, 1,000 iterations": channels("weight-scale", "bias", "input-channel-scale")
    + f"{INPUT_SCALES}+learn.iterations=1000",
    "output-error scales": "default+ranges.weight=output-error",
    "1,000 iterations": "default+learn.iterations=1000",
    "100 iterations": "default+learn.iterations=100",
    "batch 64": "default+learn.batch_size=64",
    "1,024 samples": "default+samples=1024",
    "activation rate 3e-3": "default+learn.activation_learning_rate=0.003",
    "input drop 0.5": "default+learn.input_drop=0.5",
}
CHANNELS = channels("weight-scale", "bias", "input-channel-scale") + INPUT_SCALES
NO_INPUT_SCALES = channels("weight-scale", "bias")


def scales(exponent: float, smallest: float = 0.1, bounded: int = 0) -> str:
    """Returns the change that scales input channels with some options."""
    options = f'{{"exponent":{exponent},"smallest":{smallest},"bounded":{bounded}}}'
    return f'+transforms=[{{"name":"input-channel-scale","options":{options}}}]'


ALL = channels("weight-scale", "bias", "input-channel-scale")
PLAIN = f"{ALL}{scales(0.5)}+learn.layer_loss_weight=0"
LONG = f"{PLAIN}+samples=1024+learn.iterations=1000"
UNBOUNDED = {
    "Z, 1,000 iterations, N 1,024": LONG,
    "Z, 300 iterations, N 256": PLAIN,
    "Z, 300 iterations, N 1,024": f"{PLAIN}+samples=1024",
    "Z, 1,000 iterations, N 256": f"{PLAIN}+learn.iterations=1000",
    "Z, 600 iterations, N 1,024": f"{PLAIN}+samples=1024+learn.iterations=600",
    "input scales by formula, unbounded": f"default{scales(0.5)}",
    "Z, 300 iterations, N 256, gamma 0.2": f"{ALL}{scales(0.5)}",
    "Z, 1,000 iterations, N 1,024, exponent 0.25": LONG.replace(":0.5,", ":0.25,"),
    "Z, 1,000 iterations, N 1,024, exponent 0.75": LONG.replace(":0.5,", ":0.75,"),
    "Z, 1,000 iterations, N 1,024, channel rate 3e-3": f"{LONG}+learn.channel_learning_rate=0.003",
    "Z, 1,000 iterations, N 1,024, uniform": f"{LONG}+select.strategy=uniform",
    "Z, 1,000 iterations, N 1,024, batch 64": f"{LONG}+learn.batch_size=64",
}
FREE = channels("weight-scale", "bias") + "+learn.layer_loss_weight=0"
CANDIDATES = {
    "before": BEFORE,
    "default": "default",
    "default, gamma 0": "default+learn.layer_loss_weight=0",
    "thorough, all inputs quantized": "thorough+ranges.float_input_share=0",
    "Z, 1,000 iterations, N 1,024": LONG,
    "Z, 300 iterations, N 256": PLAIN,
    "weight scales and biases, gamma 0": channels("weight-scale", "bias") + "+learn.layer_loss_weight=0",
}
TOGETHER = {
    "X: all per channel, 1,024 samples": f"{CHANNELS}+samples=1024",
    "X, 1,000 iterations": f"{CHANNELS}+samples=1024+learn.iterations=1000",
    "X, 2,500 iterations": f"{CHANNELS}+samples=1024+learn.iterations=2500",
    "X, 1,000 iterations, channel rate 3e-3": f"{CHANNELS}+samples=1024+learn.iterations=1000"
    "+learn.channel_learning_rate=0.003",
    "X, 1,000 iterations, no input scales": f"{NO_INPUT_SCALES}+samples=1024+learn.iterations=1000",
    "X, 1,000 iterations, gamma 0": f"{CHANNELS}+samples=1024+learn.iterations=1000+learn.layer_loss_weight=0",
    "X, 1,000 iterations, rate 0.03": f"{CHANNELS}+samples=1024+learn.iterations=1000+learn.weight_learning_rate=0.03",
    "X, 1,000 iterations, tau from half": f"{CHANNELS}+samples=1024+learn.iterations=1000"
    "+learn.rounding_sharpness_start=0.5",
    "X, 1,000 iterations, uniform": f"{CHANNELS}+samples=1024+learn.iterations=1000+select.strategy=uniform",
    "1,024 samples, 1,000 iterations": "default+samples=1024+learn.iterations=1000",
}
FLOAT = "+ranges.float_input_share=0.05"
FLOAT_INPUTS = {
    "default, float inputs": f"default{FLOAT}",
    "default, float inputs 2%": "default+ranges.float_input_share=0.02",
    "thorough, float inputs 8%": "thorough+ranges.float_input_share=0.08",
}
# What decides which recipe ships as `default`, in the order of importance.
SHIPS = {
    "default": "default",
    "default, float inputs": f"default{FLOAT}",
    "paper": "paper",
    "before": BEFORE,
    "thorough": "thorough",
    "ptq4dm": "ptq4dm",
    "q-diffusion, 2,500 iterations": f"q-diffusion{FEW_ITERATIONS}",
    "thorough, gamma 0.2": "thorough+learn.layer_loss_weight=0.2",
    "thorough, all inputs quantized": "thorough+ranges.float_input_share=0",
    "rtn": "rtn",
    "ranges-only": "default+learn.granularity=none",
}
FLOORS = {
    "weights only": 'default+layers=[{"pattern":"*","float_input":true}]',
    "weights only, nearest": 'default+learn.granularity=none+layers=[{"pattern":"*","float_input":true}]',
}
SHARPNESS = {
    "tau 10": "default+learn.rounding_sharpness=10",
    "tau 50": "default+learn.rounding_sharpness=50",
    "tau from the start": "default+learn.rounding_sharpness_start=0",
    "tau from half": "default+learn.rounding_sharpness_start=0.5",
    "regularizer 0": "default+learn.rounding_regularizer=0",
    "regularizer 0.003": "default+learn.rounding_regularizer=0.003",
    "rate 0.03": "default+learn.weight_learning_rate=0.03",
    "rate 0.3": "default+learn.weight_learning_rate=0.3",
}
STEPS = {
    "uniform": "default+select.strategy=uniform",
    "TDAC, median radius": "default+select.density_quantile=0.5",
    "TDAC, lambda 5": "default+select.variety_weight=5",
    "normal": "default+select.strategy=normal",
    "last": "default+select.strategy=last",
}
GAMMAS = {
    "gamma 0": "+learn.layer_loss_weight=0",
    "gamma 0.2, relative": "",
    "gamma 0.8, absolute": "+learn.layer_loss_weight=0.8+learn.relative_layer_losses=false",
}
FAIR = (
    {"default": "default", "default, gamma 0": "default+learn.layer_loss_weight=0"}
    | STEPS
    | {
        "gamma 0.8, absolute": "default+learn.layer_loss_weight=0.8+learn.relative_layer_losses=false",
        "uniform, gamma 0": "default+select.strategy=uniform+learn.layer_loss_weight=0",
        "symmetric ranges": "default+ranges.activation=search",
        "quantized attention": "default+attention.quantize=true",
        "QDrop": "default+learn.input_drop=0.5+learn.activation_drop=0.5",
    }
)
# The base of the rows of `paper` has the iterations of `default`.
PAPER = "paper+learn.iterations=300"
FAIR_PAPER = {
    "paper, 300 iterations": PAPER,
    "paper, uniform": f"{PAPER}+select.strategy=uniform",
    "paper, gamma 0": f"{PAPER}+learn.layer_loss_weight=0",
    "paper, uniform, gamma 0": f"{PAPER}+select.strategy=uniform+learn.layer_loss_weight=0",
    "paper, local radius": f"{PAPER}+select.model_radius=false+select.density_quantile=0.05",
    "paper, gamma 0.2, relative": f"{PAPER}+learn.layer_loss_weight=0.2+learn.relative_layer_losses=true",
    "paper, no QDrop": f"{PAPER}+learn.input_drop=0+learn.activation_drop=0",
    "paper, asymmetric ranges": f"{PAPER}+ranges.activation=search-asymmetric",
    "paper, tau 1 and regularizer 0": f"{PAPER}+learn.rounding_sharpness=1+learn.rounding_regularizer=0",
}


def size(samples: int) -> str:
    """Returns the change that sets the size of the calibration set; above 256 it takes several steps per trajectory."""
    return f"+samples={samples}" + (f"+select.samples_per_trajectory={samples // 256}" if samples > 256 else "")


SAMPLES = {
    f"{steps}, {name}, N {samples:,}": f"default{size(samples)}{change}"
    + ("" if steps == "TDAC" else f"+select.strategy={steps}")
    for samples in (8, 32, 256, 1024)
    for steps in ("TDAC", "uniform")
    for name, change in GAMMAS.items()
}
ROTATED = {
    f"{name}, {learning}": f'default+transforms=[{{"name":"{name}"}}]{change}'
    for name in ("hadamard-16", "hadamard-64", "hadamard-256")
    for learning, change in (("ranges-only", "+learn.granularity=none"), ("default", ""))
}
DEFAULTS = {label: SHIPS[label] for label in ("default", "default, float inputs")}
GROUPS = {
    "network-wise": Group({"network-wise": "network-wise"}),  # with --trajectories 1024, as `edadm run` collects for it
    "ships": Group(SHIPS),
    "main": Group(MAIN, seeds=(0, 1, 2, 3, 4)),
    "published": Group(PUBLISHED, seeds=(0, 1, 2, 3, 4)),
    "ingredients": Group(INGREDIENTS, ("w4a8", "w3a8")),
    "unbounded": Group(UNBOUNDED),
    "candidates": Group(CANDIDATES, ("w4a8",), (0, 1, 2, 3, 4)),
    "candidates-w3a8": Group(CANDIDATES, ("w3a8",), (0, 1, 2)),
    "together": Group(TOGETHER),
    "together-w3a8": Group(TOGETHER, ("w3a8",)),
    "float-inputs": Group(FLOAT_INPUTS),
    "default-widths": Group(DEFAULTS, ("w8a8", "w6a6", "w3a8", "w4a4")),
    "floors": Group(FLOORS, seeds=(0,)),
    "floors-w8a8": Group({"default": "default", "ranges-only": "default+learn.granularity=none"}, ("w8a8",), (0,)),
    "sharpness": Group(SHARPNESS),
    "fair": Group(FAIR),
    "fair-paper": Group(FAIR_PAPER),
    "samples": Group(SAMPLES, ("w4a8", "w3a8")),
    "widths": Group({"before": BEFORE, "default": "default", "paper": "paper"}, ("w8a8", "w3a8", "w4a4")),
    "unlearned": Group({"ranges-only": "default+learn.granularity=none", "gptq": "gptq"}, ("w4a8", "w3a8")),
    "rotated": Group({"ranges-only": "default+learn.granularity=none", "default": "default", **ROTATED}, ("w4a4",)),
    "batches": Group({f"batch {size}": f"default+learn.batch_size={size}" for size in (8, 16)}),
    "all-widths": Group(
        {label: SHIPS[label] for label in ("default", "ranges-only", "rtn")},
        ("w4a8", "w3a8", "w4a4", "w6a6", "w8a8"),
        (0,),
    ),
    "grouped": Group(
        {**{label: SHIPS[label] for label in ("default", "ranges-only")}, "gptq": "gptq"},
        ("w4g32a8", "w4g16a8", "w3g16a8"),
        (0,),
    ),
    "version-0.1": Group({"before": BEFORE}, seeds=(0,)),
    "mixed": Group({"default": "default"}, ("auto:4.5a8", "auto:3.5a8", "auto:3.5g16a8")),
}
