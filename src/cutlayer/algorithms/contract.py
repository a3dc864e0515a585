"""What an algorithm is: one round, written against the seam; its options; its needs; its traffic.

    @algorithm("psl", title="PSL", needs={FORWARD, BACKWARD}, paper="arXiv 2112.05929")
    class Psl(Algorithm):
        def round(self, server, clients, this): ...

An algorithm has no state between rounds except that of the server and the cohort, so a checkpoint between rounds is
complete. Everything else about it (flags, checks, the engine that can run it, the client's list of permitted requests,
tables) is derived from its registration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from cutlayer import plugins
from cutlayer.data.own import own_code
from cutlayer.errors import ConfigError, unknown
from cutlayer.plugins import Thing
from cutlayer.traffic import Epoch, Pattern, Traffic
from cutlayer.verbs import Traits

if TYPE_CHECKING:
    from torch import nn

    from cutlayer.cohort import Cohort
    from cutlayer.server import Server
    from cutlayer.types import Round, Rows, Step

A = TypeVar("A", bound="type[Algorithm]")


class Algorithm(Thing):
    """Base of all algorithms. Options are fields declared with `plugins.option`, so an instance is a configured
    algorithm.
    """

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """Train one round; yields a record per step."""
        raise ConfigError(f"{type(self).__name__} has no round(): write the generator that trains one round")

    def head(self, smashed: Rows, classes: int) -> nn.Module:
        """The auxiliary head of an algorithm that needs LEARN: a module that returns scores [R, K]. It is called with
        the tensors that cross, each [R, s...], one after another. `smashed` are examples of these tensors, each [n,
        s...]. The default is global average pooling and one linear layer.
        """
        from cutlayer.models.auxiliary import PooledHead

        return PooledHead(smashed, classes)

    def traffic(self, epoch: Epoch) -> Traffic | None:
        """What is sent and computed in an epoch, or None if `plan` does not support the algorithm."""
        return None

    def staleness(self, server: Server) -> dict[str, Any] | None:
        """How old batches and models of each client were when the server used them, if clients work at their own pace:
        the result of `Ages.summary`. Otherwise None.
        """
        return None

    @property
    def needs(self) -> frozenset[str]:
        """The verbs that its round uses: as registered, unless its options change that."""
        return frozenset(self.entry.facts["needs"])

    @property
    def traits(self) -> Traits:
        """What follows from its needs."""
        return Traits.of(self.needs, self.entry.facts["central"])

    @property
    def part_of_round(self) -> tuple[int, int | None]:
        """(local epochs, local steps) of a round; local steps replace epochs."""
        return 1, None

    @property
    def averages_every_step(self) -> bool:
        """Whether all client models are averaged, weighted by their numbers of samples, after every single step."""
        return False

    @property
    def shares_gradients(self) -> bool:
        """Whether a cut gradient that several clients share may come down."""
        return False

    @property
    def moves_optimizer(self) -> bool:
        """Whether the optimiser's state may travel with a client model that is handed over. If not, a client refuses to
        send it.
        """
        return True

    def without_sharing(self) -> Algorithm:
        """The same algorithm with every client's own gradient, as a server could use it to steer each client."""
        return self

    def rate_growth(self, clients: int) -> tuple[str, float]:
        """(the option that is responsible, powers of ten) by which the algorithm multiplies the server's rate, at most,
        with that many clients.
        """
        return "", 0.0


def algorithm(
    name: str,
    *,
    title: str,
    needs: Iterable[str],
    summary: str = "",
    paper: str = "",
    presets: Mapping[str, Any] | None = None,
    central: bool = False,
    spreads: Literal["", "apart", "gathered"] = "",
    client_part: str = "",
    server_part: str = "",
    colour: str = "",
    line: str = "-",
) -> Callable[[A], A]:
    """Registers an `Algorithm` under `name`. `needs` are the verbs of `cutlayer.verbs` that its round uses.

    `presets` are options of all runs that have another default with this algorithm. `central`: the data of all clients
    are collected first.

    `spreads` says whether several processes can share the clients. "apart": the round hands the rows of a step only to
    the server's `step` or `step_copies`, to `through_tails`, `gradients.own` and SplitAvg, so each process keeps its
    own rows. "gathered": the round also uses the rows in other ways, and every process gets all of them. Empty: this is
    not possible.

    `client_part` and `server_part` say why the algorithm is meaningless if that side has no parameters. `colour`
    (black, blue, green, grey, orange, purple, sky, vermillion, or "#rrggbb") and `line` ("-", "--", "-.", ":") are its
    look in plots; without a colour, it gets one that is free. Raises ValueError for a word that is not a verb.
    """
    found = sorted(Traits.of(needs, central).needs)
    return plugins.register(
        "algorithm",
        name,
        title=title,
        summary=summary,
        paper=paper,
        needs=found,
        presets=dict(presets or {}),
        central=central,
        spreads=spreads,
        client_part=client_part,
        server_part=server_part,
        colour=colour,
        line=line,
    )


def steps_of(algorithm: Algorithm, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
    """The steps of one round. Raises ConfigError if an algorithm from outside this package fails, or yields anything
    else.
    """
    from cutlayer.types import Step

    what = f"the algorithm {algorithm.entry.name!r}"
    with own_code(algorithm, f"the round of {what}"):
        steps = algorithm.round(server, clients, this)
        if not isinstance(steps, Iterator):
            raise ConfigError(f"round() of {what} returns {steps!r}: make it a generator that yields a Step per step")
        for step in steps:
            if not isinstance(step, Step):
                raise ConfigError(f"round() of {what} yields {step!r}: yield a cutlayer.types.Step per step")
            yield step


def traffic_of(algorithm: Algorithm, epoch: Epoch) -> Traffic | None:
    """The algorithm's statement of what is sent and computed in an epoch; None: not planned. Raises ConfigError."""
    what = f"`traffic` of the algorithm {algorithm.entry.name!r}"
    with own_code(algorithm, what):
        found = algorithm.traffic(epoch)
    if found is not None and not isinstance(found, Traffic):
        raise ConfigError(f"{what} returns {found!r}: return a cutlayer.traffic.Traffic, or None")
    if found is not None and found.pattern not in get_args(Pattern):
        raise ConfigError(f"{what}: {unknown('pattern', str(found.pattern), get_args(Pattern))}")
    return found


def traits_of(entry: plugins.Entry) -> Traits:
    """The traits of a registered algorithm."""
    return Traits.of(entry.facts["needs"], entry.facts["central"])
