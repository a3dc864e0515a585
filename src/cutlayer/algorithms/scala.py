"""SCALA: SplitFed learning with the logits adjusted on both sides, against label skew (arXiv 2405.04875).

One step, P_k being the shares of the classes at client k and P_S those of all participants (`cutlayer.adjustment`):
    1. every client k, in parallel: s_k = f(w_k; x_k); upload (s_k, y_k)
    2. server: ONE loss on the concatenated rows; v <- v - eta dv mean CE(g(v; s) + tau log P_S, y)
    3. server, at the same v: G_k = d/ds_k mean CE(g(v; s_k) + tau log P_k, y_k)
    4. every client k: w_k <- w_k - eta (ds_k/dw_k)^T G_k
At the end of a round client models are averaged with n_k. Predictions use the scores as they are.
"""

from __future__ import annotations

from dataclasses import replace

from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.splitfed import AVERAGES, Sfl
from cutlayer.traffic import Epoch, Traffic
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD


@algorithm(
    "scala",
    title="SCALA",
    summary="SFL with the logits adjusted to the classes' shares at the server and at each client",
    paper="arXiv 2405.04875",
    needs={FORWARD, BACKWARD, AVERAGE},
    spreads="apart",
    presets={"logit_adjust": "both"},
    client_part=AVERAGES,
    colour="vermillion",
    line="--",
)
class Scala(Sfl):
    """SplitFed learning with adjusted logits: steps 2 and 3 are the server's `step` where logits are adjusted."""

    def traffic(self, epoch: Epoch) -> Traffic:
        """As SFL; the server goes back to the cut twice, once for each loss."""
        return replace(super().traffic(epoch), answers_apart=True)
