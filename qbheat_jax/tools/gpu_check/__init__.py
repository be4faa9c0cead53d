"""Check a machine with a GPU: `bash launch/gpu_check.sh`, or `python -m qbheat_jax.tools.gpu_check`. See docs/gpus.md.

A part is a list of jobs. A job is a process of its own, so that one that XLA aborts, or that hangs, leaves the others. Each
writes what it has measured as it goes, and that is kept where its time runs out. TensorFlow is never imported.
"""

import dataclasses

# Of `--tiny`, see tiny.py.
TINY_ENCODER = "vit_check"


@dataclasses.dataclass(frozen=True)
class Part:
    """One question to the machine.

    Attributes:
      question: What it answers, for the report.
      seconds: Its time limit. What one part leaves, the next ones may use.
      jobs: Names of its jobs, longest first.
      tiny: The jobs of `--tiny`.
      timed: Whether jobs measure speed: they then take turns, and all others stand still meanwhile.
    """

    question: str
    seconds: int
    jobs: tuple
    tiny: tuple
    timed: bool = False


# Seven minutes together, with what precedes them.
PARTS = {
    "values": Part(
        "Do values and gradients of every encoder agree with the CPU's, in float32 and in bfloat16?",
        85,
        (
            "mobile_former_w2880", "mobile_former_w1440", "mobile_former_w720", "mobile_former_508m", "mobile_former_294m",
            "mobile_former_214m", "mobile_former_151m", "resnet50", "efficientnet_lite0", "mobilenet_v2", "mobile_former_96m",
            "mobile_former_52m", "mobile_former_26m", "mobile_former_tiny", "vit_b", "resnet18", "vit_s", "vit_ti",
        ),
        (TINY_ENCODER,),
    ),
    "resume": Part(
        "Does a run that is killed and resumed end as one that is not, bit for bit?",
        85,
        ("deterministic", "plain"),
        ("plain",),
    ),
    "objectives": Part(
        "Do the steps of the other objectives run?", 40, ("detr", "dense", "moco", "simmim", "mae"), ("mae",)
    ),
    "steps": Part(
        "How fast is QB-Heat's train step, and where does its time go?",
        125,
        ("mobile_former_w720", "resnet50", "vit_b"),
        (TINY_ENCODER,),
        timed=True,
    ),
    "peers": Part(
        "How fast are classifiers trained beside the same ones in PyTorch?",
        75,
        ("mobile_former_w720", "resnet50", "vit_b"),
        (TINY_ENCODER,),
        timed=True,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the jobs are. Those of `--tiny` are for a CPU, to try the program and not the machine."""

    tiny: bool = False
    # values
    value_batch: int = 8
    value_pixels: int = 64
    # resume
    resume_steps: int = 60
    resume_every: int = 20
    resume_killed: int = 47
    resume_batch: int = 64
    resume_again: tuple = ("same program", "compiled anew")
    # steps and peers
    batches: tuple = (("mobile_former_w720", 256), ("resnet50", 128), ("vit_b", 128))
    step_pixels: int = 256
    peer_batch: int = 128
    peer_pixels: int = 224
    peer_ways: tuple = ("channels-last", "compile")
    dtype: str = "bfloat16"
    traced: int = 3
    rounds: int = 3
    seconds: float = 1.0
    peer_seconds: float = 0.4


FULL = Sizes()
TINY = Sizes(
    tiny=True, value_batch=2, value_pixels=32, resume_steps=4, resume_every=1, resume_killed=3, resume_batch=4,
    resume_again=("same program",), batches=((TINY_ENCODER, 2),), step_pixels=64, peer_batch=2, peer_pixels=32,
    peer_ways=("channels-last",), dtype="float32", traced=1, rounds=2, seconds=0.0, peer_seconds=0.0,
)  # fmt: skip
