"""GSCALA: SCALA whose batches are drawn from the data of all clients together.

SCALA (arXiv 2405.04875) adjusts each side's loss by the frequencies of the classes there. Its clients bring equal
numbers of rows to each step, or numbers in proportion to their sizes. Here a step's rows are drawn as in GPSL (arXiv
2407.15738): from all data, without replacement. So the server sees the classes with their frequencies among the
participants, and all rows of large clients are used exactly once.

One step of B = C b rows, P_k being the shares of the classes at client k and P_S those of all participants:
    1. draw B rows from the data of all participants; every client k with rows among them: s_k = f(w_k; x_k); upload
    2. server: ONE loss on the concatenated rows; v <- v - eta dv mean CE(g(v; s) + tau log P_S, y)
    3. server, at the same v: G_k = d/ds_k mean CE(g(v; s_k) + tau log P_k, y_k)
    4. the same clients: w_k <- w_k - eta (ds_k/dw_k)^T G_k
At the end of a round client models are averaged with n_k.
"""

from __future__ import annotations

from cutlayer.algorithms.contract import algorithm
from cutlayer.algorithms.scala import Scala
from cutlayer.algorithms.splitfed import AVERAGES
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD


@algorithm(
    "gscala",
    title="GSCALA",
    summary="SCALA on rows drawn from all data",
    paper="arXiv 2405.04875",
    needs={FORWARD, BACKWARD, AVERAGE},
    spreads="apart",
    presets={"logit_adjust": "both", "sampling": "global"},
    client_part=AVERAGES,
    colour="vermillion",
    line=":",
)
class Gscala(Scala):
    """SCALA with global sampling: the rows of a step come from all participants together."""
