"""Check a machine with a GPU: `bash launch/gpu_check.sh`, or `python -m qbheat_jax.tools.gpu_check`. See docs/gpus.md.

A part is a list of jobs. Each job is a separate process, so that a hang or an abort of XLA does not affect the others.
Jobs save their measurements as they go, which keeps them after a timeout. TensorFlow is never imported.
"""

import dataclasses

# Encoder of `--tiny`, see tiny.py.
TINY_ENCODER = "vit_check"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
      question: The question that it answers, for the report.
      seconds: Time limit. Later parts may use time that is left over.
      jobs: Names of the jobs, longest first.
      tiny: Names of the jobs with `--tiny`.
      timed: Whether jobs measure speed. They then take turns, and the others are paused meanwhile.
    """

    question: str
    seconds: int
    jobs: tuple
    tiny: tuple
    timed: bool = False


# Together they take seven minutes, including the start.
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
        "Does a killed and resumed run end bit for bit like an uninterrupted one?",
        85,
        ("deterministic", "plain"),
        ("plain",),
    ),
    "objectives": Part(
        "Do the train steps of the other methods run?", 40, ("detr", "dense", "moco", "simmim", "mae"), ("mae",)
    ),
    "steps": Part(
        "How fast is QB-Heat's train step, and which kernels take its time?",
        125,
        ("mobile_former_w720", "resnet50", "vit_b"),
        (TINY_ENCODER,),
        timed=True,
    ),
    "peers": Part(
        "How fast is the training of classifiers, compared with PyTorch?",
        75,
        ("mobile_former_w720", "resnet50", "vit_b"),
        (TINY_ENCODER,),
        timed=True,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the jobs. Those of `--tiny` suit a CPU and test the program instead of the machine."""

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
