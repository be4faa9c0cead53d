"""Parameter names of HcNet's first generation, `generation="a"`. Its files hold a count of neighbours too, `mean_num`."""

from qbheat_jax.models.hcnet import HcNet
from qbheat_jax.port.names import Table
from qbheat_jax.port.tables import hcnet

TABLE = Table(
    module=HcNet,
    fields={"generation": "a"},
    rules=hcnet.rules("fc_0", "dwconv"),
    head=r"head\.",
    signs=lambda encoder: {f"{n}.mlp.dwconv.weight": (4 * c, 1, 3, 3) for n, c in hcnet.last_blocks(encoder)},
    options=hcnet.options,
    ignored=r"layers\.\d\.blocks\.\d+\.mean_num",
)
