"""Files that hold something else than a model's plain weights, told by their names, and what to do about each."""

import re

_OPTIMIZER = r"(.*\.)?(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg|exp_inf|step)(\..+)?"
_ADAPTER = r".*(lora_(A|B|up|down|embedding_A|embedding_B|magnitude_vector)|hada_w\d|adapter_[\w]+|ia3_l)(\..+)?"
_NORMALISED = r".*(\.weight_[gv]|\.parametrizations\.\w+\.original\d?)"
_PRUNED = r".*\.(weight_orig|weight_mask|weight_u)"
_QUANTISED = r".*(\.(zero_point|_packed_params.*|absmax|quant_map|qweight|qzeros|weight_scale|SCB))"
_FLAT = r".*(flat_param|_fsdp_flat_param)(_\d+)?"

_OPTIMIZER_WORDS = "it is an optimizer's state ({}): name the model's own file, such as pytorch_model.bin"
# (regular expression, whether every name must be such, what it is and what to do). {}: the first such name.
_KINDS = (
    (r"param_groups", False, _OPTIMIZER_WORDS),
    (_OPTIMIZER, True, _OPTIMIZER_WORDS),
    (
        _ADAPTER, False,
        "it is an adapter (LoRA: {}), not merged into its base model: merge it (peft: merge_and_unload()) and save that "
        "model's state_dict()",
    ),
    (
        _NORMALISED, False,
        "a layer of it is parametrised, as by weight_norm ({}): take that off "
        "(torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm) and save it again",
    ),
    (
        _PRUNED, False,
        "it is pruned or spectrally normalised ({}): make that permanent (prune.remove, remove_spectral_norm), then save",
    ),
    (_QUANTISED, False, "it is quantised ({}): save it in float32 or float16"),
    (_FLAT, False, "it is one rank's part of a sharded model (FSDP: {}): save it with a full state_dict"),
)  # fmt: skip


def told(names):
    """What a file of these names is, in words that say what to do; "" where nothing is known of it."""
    for pattern, every, words in _KINDS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found and (not every or len(found) == len(names)):
            return words.format(found[0])
    return ""
