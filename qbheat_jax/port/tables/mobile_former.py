"""Parameter names of Mobile-Former's release (arXiv 2108.05895). QB-Heat's sizes add a last convolution, `last`."""

from qbheat_jax.models.mobile_former import MobileFormer
from qbheat_jax.port.names import Table


def signs(variant):
    """Return {parameter name: shape} that a file of this variant must have."""
    last = len(variant.blocks) - 1
    return {
        "stem.0.weight": (variant.stem, 3, 3, 3),
        "tokens.weight": (variant.tokens, variant.token_dim),
        f"features.{last}.local_global.q.weight": (variant.blocks[-2][2], variant.token_dim),
    }


TABLE = Table(
    module=MobileFormer,
    rules=(
        (r"encoder/tokens", r"tokens.weight"),
        (r"encoder/stem/conv", r"stem.0"),
        (r"encoder/stem/bn", r"stem.1"),
        (r"encoder/features_(\d+)/depthwise/conv", r"features.\1.conv.0"),
        (r"encoder/features_(\d+)/depthwise/bn", r"features.\1.conv.1"),
        (r"encoder/features_(\d+)/pointwise/conv", r"features.\1.conv.4"),
        (r"encoder/features_(\d+)/pointwise/bn", r"features.\1.conv.5"),
        (r"encoder/features_(\d+)/conv(\d)/conv", r"features.\1.conv\2.0"),
        (r"encoder/features_(\d+)/conv(\d)/bn", r"features.\1.conv\2.1"),
        (r"encoder/features_(\d+)/hyper(\d)/fc(\d)", r"features.\1.hyper\2.hyper.\3"),
        (r"encoder/features_(\d+)/local_global/alpha", r"features.\1.local_global.alpha.0"),
        (r"encoder/features_(\d+)/local_global/(q|proj|layer_norm)", r"features.\1.local_global.\2"),
        (r"encoder/features_(\d+)/global_block/ffn(\d)", r"features.\1.global_block.ffn.\2"),
        (
            r"encoder/features_(\d+)/global_block/(q|channel_mlp|layer_norm|ffn_norm)",
            r"features.\1.global_block.\2",
        ),
        (r"encoder/features_(\d+)/global_local/(k|proj)", r"features.\1.global_local.\2"),
        (r"encoder/local_global/alpha", r"local_global.alpha.0"),
        (r"encoder/local_global/(q|proj|layer_norm)", r"local_global.\1"),
        (r"encoder/last/conv", r"last.0"),
        (r"encoder/last/bn", r"last.1"),
        (r"head/conv/conv", r"classifier.conv.1"),
        (r"head/conv/bn", r"classifier.conv.2"),
        (r"head/fc", r"classifier.fc.0"),
        (r"head/bn", r"classifier.fc.1"),
        (r"head/classifier", r"classifier.classifier.1"),
    ),
    head=r"classifier\.",
    signs=lambda encoder: signs(encoder.variant),
)
