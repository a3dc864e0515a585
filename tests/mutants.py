"""Mutation testing: small errors are put into copies of the code, one at a time, and tests run on each copy.

    python tests/mutants.py [--only NAME...] [--area AREA...] [--jobs N] [--out FILE] [--hints FILE] [--check]

A mutant replaces a snippet of the code. The snippet must occur exactly once in src/cutlayer. Line breaks do not matter,
and code may move between files. If `after` is given, that text must occur once, and the first snippet behind it is
replaced. A mutant whose snippet is not found must be rewritten. The working tree does not change: tests run on a copy
of src.

The tests of an area are those whose path under tests/ fits one of its patterns, in the order of the patterns, until the
first failure. Tests that start processes or servers, tests of large models and tests marked slow are left out, unless
the area gives their full path. First, all tests must pass without a mutant.

--out appends results to FILE as JSON lines. A mutant with a result in FILE is not run again, so use another file after
a change. --hints reads the results of an earlier run and first tries the test that noticed a mutant then, which is
enough for most mutants. --check runs no tests and only checks that every mutant can be applied and compiles.
"""

# ruff: noqa: E501 (a mutant is a line)

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PACKAGE = ROOT / "src" / "cutlayer"

# Patterns of file names. Hostile clients are a program, and the tests of the command line take a minute.
LEFT_OUT = (
    "*network*", "*signals*", "*namespaces*", "*chaos*", "*deployment*", "*flower*", "*readme*", "*test_fuzz*",
    "*reproduce*", "*over_grpc*", "*test_cli.py", "*transport*",
)  # fmt: skip

# A selection by test names. Large models take long, and small ones are tested in the same way.
KEYWORDS = "not resnet and not alexnet"

# Patterns of paths under tests/. Fast tests, and those closest to the area, come first.
AREAS: dict[str, Sequence[str]] = {
    "algorithms": ("*sglr*", "*golden*", "*test_seam*", "*identit*", "*options*", "*test_costs*"),
    "server": ("*seam_operations*", "*golden*", "*test_seam*", "*options*", "*identit*", "*engines*", "*stacked*"),
    "gradients": ("*sglr*", "*golden*", "*test_seam*", "*options*", "*identit*", "*engines*", "*stacked*"),
    "stopping": ("*test_stopping*",),
    "loggers": ("*test_loggers*",),
    "likeness": ("*test_likeness*",),
    "mould": ("*test_mould*",),
    "gscala": ("*test_gscala*",),
    "markup": ("*test_markup*",),
    "citations": ("*test_references*", "*test_citing*"),
    "observations": ("*test_observations*",),
    "overwriting": ("*test_overwriting*",),
    "shown": ("*test_shown*",),
    "disk": ("*test_shelved*",),
    "recomputed": ("*test_recomputed*",),
    "plans": ("*test_plan*",),
    "products": ("*test_products*",),
    "divided": ("*costs/test_divided*", "*engine/test_distributed*"),
    "signs": ("*test_signs*", "*test_launched*"),
    "ranks": ("*test_collective*", "*test_launched*", "*engine/test_distributed*"),
    "crew": ("*test_crew*", "*test_footprint*", "*test_progress*"),
    "robust": ("*test_averagings*", "*test_screened*", "*test_screenings*", "*test_attacks*"),
    "skew": ("*test_adjustment*", "*test_sampling*", "*test_in_step*", "*test_cycle*"),
    "pace": ("*test_gas*", "*test_underway*", "*test_staleness*"),
    "averaging": ("*test_seam*", "*golden*", "*identit*", "*engines*"),
    "cuts": ("*test_mixed_plan*", "*test_between*", "*test_allotted*", "*test_mixed_cuts*"),
    "studies": ("*test_sweep*", "*test_paired*", "*test_outputs*"),
    "effort": ("*test_searches*", "*test_effort*", "*test_trials*"),
    "hostile": ("*test_floods*", "*test_hostile_clients*", "*test_patience*"),
    "local": (
        "*seam_operations*",
        "*golden*",
        "*options*",
        "*test_seam*",
        "*engines*",
        "*identit*",
        "*resume*",
        "*stacked*",
    ),
    "stack": ("*golden*", "*engines*", "*stacked*", "*options*", "*test_seam*"),
    "kernels": ("*test_descent*", "*test_chain*", "*engines*", "*stacked*"),
    "convolutions": ("*test_convolutions*", "*engines*", "*stacked*"),
    "chain": ("*test_chain*",),
    "pooling": ("*test_pooling*",),
    "layout": ("*test_pooling*", "*test_tuning*"),
    "descent": ("*test_descent*",),
    "ways": ("*test_tuning*",),
    "tuning": ("*test_tuning*",),
    "remembered": ("*test_tuning*",),
    "simulation": ("*seam_operations*", "*defen*", "*test_frozen*"),
    "trace": ("*trace_draws*", "*test_cut*"),
    "lowering": ("*stacked*", "*options*"),
    "mapping": ("*test_mapping*", "*stacked*"),
    "union": ("*golden*", "*stacked*", "*engines*"),
    "choice": ("*test_tuning*", "*seam_operations*", "*options*", "*stacked*"),
    "ledger": ("*test_seam*", "*test_costs*", "*resume*", "*test_plan*"),
    "clock": ("*test_costs*", "*seam_operations*", "*test_plan*"),
    "traces": ("*test_traces*",),
    "checkpoint": ("*test_costs*", "*resume*"),
    "partitions": ("*test_partition*",),
    "fairness": ("*test_clients*", "*test_measures*"),
    "momentum": ("*test_smofi*",),
    "order": ("*test_splitfed*",),
    "codecs": ("*wire.py", "*test_coded*", "*wire_fuzz*", "*test_testing*"),
    "coding": ("*wire.py", "*options*", "*test_seam*", "*test_costs*", "*test_remote*"),
    "defences": ("*test_defences*", "*leakage_dp*", "*test_testing*"),
    "batches": ("*test_seam*", "*golden*", "*resume*", "*test_remote*"),
    "seeds": ("*test_seeds*", "*options*", "*golden*", "*test_seam*", "*resume*", "*sglr*", "*stacked*"),
    "features": ("*test_features*",),
    "reading": ("*test_lazy*",),
    "frozen": ("*test_frozen*",),
    "training": ("*test_optim*", "*test_schedules*"),
    "schedules": ("*test_seam*", "*options*", "*golden*"),
    "registry": (
        "*test_public*",
        "*test_outside*",
        "*test_own_algorithm*",
        "*bad_input*",
        "*test_extending*",
        "*test_testing*",
    ),
    "tasks": ("*test_tasks*", "*seam_operations*"),
    "data": ("*test_sources*",),
    "printed": ("*cli/test_results*", "*bad_input*"),
    "contest": ("*test_contest*",),
    "text": ("*test_texts*",),
    "recovery": ("*test_recovery*",),
    "checkpointed plan": ("*test_checkpointed_plan*",),
    "adapter ranks": ("*averagings/test_products*", "*remote/test_adapter_ranks*", "*test_ranked_plan*"),
    "adapters": ("*test_adapters*", "*test_hf*"),
    "another model": ("*test_another_model*",),
    "client": ("*test_forbidden*", "*test_allowance*", "*test_text*"),
    "copies": ("*test_copies*",),
    "ends": ("*test_stacked_ends*", "*test_ushaped*"),
    "heads": ("*test_auxiliary*", "*test_stacked_ends*"),
    "worker": ("*test_remote*", "*test_tasks*"),
    "traffic": ("*test_costs*", "*test_plan*", "*test_testing*"),
    "admission": ("*test_admission*", "*test_serving*"),
    "certificates": ("remote/test_transport.py",),
    "complex": ("*test_vetting*", "*property_engines*"),
    "stored": ("*test_errors*", "*test_files*", "*remote/test_names*", "*remote/test_serve*", "*test_stored*"),
}


class Mutant(NamedTuple):
    """An error: `snippet` becomes `replacement`. It occurs once, or is the first one behind `after`."""

    name: str
    area: str
    snippet: str
    replacement: str
    after: str = ""


M = Mutant
MUTANTS = [
    # Tails and auxiliary heads
    M("a second forward pass forgets the tail's gradients", "ends", "def _given(self, p: _Pass, *, fresh: bool = False)", "def _given(self, p: _Pass, *, fresh: bool = True)"),
    M("the tail draws what the lower part drew", "ends", 'stream = partial(self._stream, name=draw)', 'stream = self._stream'),
    M("the optimiser knows tails by other names", "ends", "called = str if tail is None else partial(name_in_whole, shape=setup.shape)", "called = str"),
    M("passes that nothing came of leave no statistics", "ends", "self._end_passes()\n        batch, groups", "batch, groups"),
    M("who left counts in the server's step", "ends", "spread(share, tail.sizes)", "spread([1 / len(share)] * len(share), tail.sizes)"),
    M("heads are averaged though they are apart", "heads", "if n in tensors and n not in self._apart", "if n in tensors"),
    M("heads are taken for equal after averaging", "heads", "alike = self._alike and not self._heads_apart", "alike = self._alike"),
    M("the last of h batches is sent", "heads", "clients.learn(self.upload_every)", "clients.learn(self.upload_every + 1)"),
    M("gradients are kept in the scale of means", "heads", 'if self.align_scale == "row":', 'if self.align_scale == "mean":'),
    M("each fitting starts anew", "heads", "head.load_state_dict(before)", "pass"),
    M("clients send their rows again", "heads", 'if f"{k} labels" not in server.kept', "if True"),
    # Gradient checkpointing, and plans of it
    M("blocks are computed again with the weights of now", "recomputed", "both = partial(_twice, held)", "both = partial(_twice, [])"),
    M("a block with a cut in it is wrapped", "recomputed", "and not any(m._forward_hooks for m in block.modules() if m is not block)", ""),
    M("a graph's blocks are computed once", "recomputed", "if not (self.again and is_grad_enabled()):", "if True:"),
    M("running statistics may see a batch twice", "recomputed", 'if getattr(module, "track_running_stats", False):', "if False:"),
    M("a tail is never computed again", "recomputed", "found += [depth.parts.client, depth.parts.tail]", "found += [depth.parts.client]"),
    M("a block's inputs are not held", "recomputed", "for tensor in tensors_in((args, dict(kwargs))):", "for tensor in ():"),
    M("scales of a batch are counted for its rows alone", "plans", "smashed_besides=smashed.besides,", "smashed_besides=0,"),
    M("a common gradient has no scales", "plans", "paper = paper + self.sharing.ever * (gradient + besides // max(first, 1))", "paper = paper + self.sharing.ever * gradient"),
    M("the server has one client's rows", "plans", "clients, copies = 1 if in_turn else config.clients,", "clients, copies = 1,"),
    M("scales take no time", "plans", "return size * self.sent + self.sent_besides", "return size * self.sent"),
    # Adapters averaged by their products
    M("products are not weighted", "products", "columns = (p[:, None, None] * b)", "columns = (torch.ones_like(p)[:, None, None] / len(p) * b)"),
    M("what a product lacks has no rows", "products", "if rest > 0:", "if False:"),
    M("rows are as long as their singular values say", "products", "new_first[: v.shape[1]] = scale * (v * sign).T", "new_first[: v.shape[1]] = (v * sign).T"),
    M("a smaller rank is lost in averaging", "products", "narrow(client.module, rank)", "pass"),
    M("clients of different ranks count as equal", "products", "self._alike = not (self._at_work or self.setup.ranks)", "self._alike = not self._at_work"),
    M("zeros beyond a rank are sent", "products", "model=size.model - less,", "model=size.model,"),
    M("clients of different ranks get one message", "products", "self.clients.cuts or numbers(self.clients.ranks),", "self.clients.cuts,"),
    M("rounding is a direction", "products", "_NOTHING = 1e-9", "_NOTHING = 0.0"),
    # Notebooks
    M("foreign text is markup", "markup", '"<td>{escape(cell)}</td>"', '"<td>{cell}</td>"'),
    M("an early end is not shown", "markup", '[("ended early", self.stopped)] if self.stopped else []', "[]"),
    # Citations
    M("an unknown paper is passed over", "citations", 'if not _key(name) and not name.startswith("@"):', "if False:"),
    M("options without effect are cited", "citations", "resolved, given = config.resolved(), dict(own or {})", "resolved, given = config.model_dump(), dict(own or {})"),
    M("a library counts as the data's citation", "citations", 'used["kind"] == "data" and used["paper"]', 'used["kind"] == "data"'),
    M("an unfinished run says nothing", "citations", "for name in (RESULT, ALGORITHM):", "for name in (RESULT,):"),
    M("figures are cited unasked", "citations", '["matplotlib"] if (folder / CURVES).exists() else []', '["matplotlib"]'),
    # Tables in Python
    M("rows lack the columns of others", "observations", "columns = dict.fromkeys(name for row in found for name in row)", "columns = dict.fromkeys(found[0] if found else ())"),
    M("unknown values stay objects", "observations", "if frame[name].isna().all()]", "if False]"),
    M("one study is called by its name", "observations", 'tidy.observed(collect.read(Path(first))) if not more else', "False or"),
    M("the spread is the mean", "observations", '"score_std": row.score_std,', '"score_std": row.score_mean,'),
    # Folders that are replaced
    M("old results count as this comparison's", "overwriting", "where = None if self._replaces else self._where(entry, seed)", "where = self._where(entry, seed)"),
    M("a comparison replaces itself", "overwriting", "self._replaces = False\n            yield", "yield"),
    M("links in a comparison are followed", "overwriting", "run.is_dir() and not run.is_symlink())", "run.is_dir())"),
    M("all files are a run's", "overwriting", "elif not _DERIVED.fullmatch(name):", "elif False:"),
    M("every config.toml is a run's", "overwriting", 'if not comparison and "algorithm" not in stored:', "if not stored:"),
    M("the folder is emptied too early", "overwriting", "world().first(lambda: refuse_used(where, overwrite=overwrite))", "world().first(lambda: Folder.create(where, {}, overwrite=overwrite).close())"),
    # Output in notebooks and logs
    M("a longer line shows through", "shown", "{text:<{self._length}}", "{text}"),
    M("a log has every step", "shown", "keep=standing.evaluations > told", "keep=True"),
    M("the cause is not shown", "shown", "if self.__cause__ is not None:", "if False:"),
    M("all rows are shown", "shown", "for row in rows[:_SHOWN]]", "for row in rows]"),
    # Loggers and callbacks
    M("one that failed is told again", "loggers", "self._hearing.pop(who, None)", "pass"),
    M("a failure is not said", "loggers", "place_of(listener, error)} ({_reason(error)})", "place_of(listener, error)} ()"),
    M("all steps are written", "loggers", "record.step % listener.log_every == 0", "True"),
    M("who could not begin hears the end", "loggers", "self._hearing[who] = listener", "self._hearing.update(self._all)"),
    M("steps that are trained again stay", "loggers", 'int(line["step"]) < run.steps', 'int(line["step"]) <= run.steps'),
    M("evaluations of the future stay", "loggers", 'int(line["round"]) <= run.rounds', "True"),
    M("a folder passes for a package", "loggers", "spec is None or spec.origin is None", "spec is None"),
    M("an interruption is not told", "loggers", "finally:\n            self._audience.end(self.result)", "finally:\n            self._audience.end(self.result) if self.result else None"),
    # Early stopping
    M("equal scores count as better", "stopping", "len(ranks) - 1 - ranks.index(max(ranks))", "ranks[::-1].index(max(ranks))"),
    M("one evaluation too many", "stopping", "ranks.index(max(ranks)) >= self.config", "ranks.index(max(ranks)) > self.config"),
    M("it goes on when resumed", "stopping", "self._start_round if self._idle else end", "end"),
    M("the last round is not judged anew", "stopping", "if self._whose_at_the_end() is not None:", "if False:"),
    M("the rounds that were planned", "stopping", "rounds=self.evaluations[-1].round", "rounds=self.training.rounds"),
    # Runs side by side
    M("a warning of each process", "crew", "self._noted.add(text)", "pass"),
    M("only as many jobs as processes", "crew", "if waiting:\n                        member.begin", "if False:\n                        member.begin"),
    M("errors without their fields", "crew", "error.__dict__.update(state)", "pass"),
    M("seeds in the order of their ends", "crew", "{s: found[s] for s in self.config.seeds if s in found}", "{s: found[s] for s in sorted(found)}"),
    M("the smallest runs together", "crew", "sorted(needs.values(), reverse=True)\n    if free", "sorted(needs.values())\n    if free"),
    M("memory not shared", "crew", "(sharing() if processes is None else processes)", "1"),
    M("no room for optimisers", "crew", "PER_MODEL = 7", "PER_MODEL = 1"),
    M("no time for what is under way", "crew", "(self._reached[n] - self._began.get(n, 0.0))", "(self._reached[n] == 1.0)"),
    # States on disk
    M("rows of a checkpoint are overwritten", "disk", "fixed[held] = True", "pass"),
    M("the state before is not kept until the next is in place", "disk", "self._held = (*self._held[-1:], slots)", "self._held = (slots,)"),
    M("models from before the run stay behind", "disk", "shelf.move()", "shelf.forget()"),
    M("a killed attempt's files are carried along", "disk", "settle(out, begin=False)", "settle(out, begin=True)"),
    M("the average forgets those without rows", "disk", "one * rest if is_continuous(one)", "one * 0.0 if is_continuous(one)"),
    M("the mean of those kept is the average", "disk", "if self.mean is not None:\n            return self.mean", "if False:\n            return self.mean"),
    M("the local engine takes it and does nothing", "disk", 'if engine == "local":\n            raise', 'if False:\n            raise'),
    M("no optimiser on disk", "disk", "self._moments_of.put(_clients_of(span)", "self._moments_of.put(_clients_of(span)[:0]"),
    # Several ranks
    M("each rank's loss is a mean of its own", "ranks", "return losses.sum() / self._total", "return losses.mean()", "class DataParallel"),
    M("ranks step with gradients of their own", "ranks", "self._world.totalling([*gradients, *losses])", "self._world.totalling(losses)"),
    M("the common gradient of a rank's own clients", "ranks", "smashed.added(totals)", "pass"),
    M("ranks average alike, whatever they hold", "ranks", "t.mul_(share) if share else t.zero_()", "t.mul_(0.5)"),
    M("clients draw by their numbers on the rank", "ranks", "return self.mine[client]", "return client", "class OwnClients"),
    M("gradients are summed on each rank alone", "ranks", "self.total(list(found.values()))", "pass"),
    M("all batches are whole", "ranks", "return tuple(np.minimum(batch, self._counts[who] - at).tolist())", "return tuple([batch] * len(clients))"),
    M("each round draws from the start", "ranks", "self._drawn[who] += 1", "pass"),
    M("nothing goes down to others", "ranks", "self.crossed.append(Crossed(\"down\", gradients.clients, down))", "pass"),
    M("losses in single precision", "ranks", "for _ in range(3):  # of 24 bits", "for _ in range(1):  # of 24 bits"),
    M("losses of the first rank's clients", "ranks", "losses[first : first + len(own)] = own", "losses[: len(own)] = own"),
    M("shared gradients are not multiplied out", "ranks", "return sum(payload_bytes(codec, r.shape, r.dtype) for r in gradients.common)", "return 0"),
    M("ranks have states on disk", "ranks", 'if config.client_states == "disk": raise ConfigError( f"client_states = \'disk\' has no effect on {ranks}', 'if False: raise ConfigError( f"client_states = \'disk\' has no effect on {ranks}'),
    M("ranks share anything", "ranks", 'not algorithm.entry.facts.get("spreads")', "False"),
    M("ranks average by means, whatever the rule", "ranks", "self._mean(weights) if self._whole.rule.plain else self._by_rule(weights)", "self._mean(weights)"),
    M("adapters on several ranks forget their own", "ranks", "self._narrow()", "pass", "self._stack.load_all(named)"),
    M("copies that all ranks have are summed", "divided", "and traits.server_copies and not gathered", "and traits.server_copies"),
    M("gathered rows with losses", "divided", "(others * clients * _LOSS if traffic.tails else 0)", "others * clients * _LOSS"),
    M("tails as any other", "divided", "along = server.trainable and not (traits.server_copies or traffic.tails)", "along = server.trainable and not traits.server_copies"),
    M("labels are gathered where there are none", "divided", "(work.label if traffic.labels else 0)", "work.label"),
    M("who has left is missed", "signs", "if new == old and new != _LEAVES", "if new == old"),
    M("signs are minutes apart", "signs", "self.pause = min(_MOST, limit / 4)", "self.pause = limit / 4"),
    M("who never waited is not missed", "signs", "if new == old and", "if old and new == old and"),
    M("a store that does not answer says nothing", "signs", "return (0,) if self._rank else ()", "return ()"),
    M("a rank is silent after one pause", "signs", "for _ in range(3):\n self.give()", "for _ in range(1):\n                self.give()"),
    M("who looks for others gives no signs itself", "signs", "self.give()\n time.sleep(self.pause)", "time.sleep(self.pause)"),
    M("each rank that does not come is waited for in full", "signs", "max(0.01, end - time.monotonic())", "seconds"),
    M("a time for a single process", "signs", "if timeout is not None: raise ConfigError", "if False: raise ConfigError"),
    M("an error that all have is said by all", "ranks", "return follows and (", "return False and ("),
    # Label skew
    M("clients are answered with the server's loss", "skew", "leaf.grad = gradient", "leaf.grad = None", "def apart(mine"),
    M("shares of a class to no power", "skew", "(shares**tau + _ABSENT)", "(shares + _ABSENT)"),
    M("participants of all rounds", "skew", "counts[list(participants)].sum(0)", "counts.sum(0)"),
    M("copies are not adjusted", "skew", "self._copies[client]._adjustment = self._adjustment", "pass"),
    M("blocks of one client's size", "skew", "np.repeat(np.arange(len(samples)), samples), len(samples) * batch", "np.repeat(np.arange(len(samples)), samples), batch"),
    M("rows begin anew with each batch", "skew", "self.taken[client] += some", "self.taken[client] += 0 * some + (some if size == some else 0)"),
    M("a client sits out no step", "skew", "found += [size] if size else []", "found += [size]"),
    M("only those with rows step together", "skew", "for client in self._clients:\n            client.take(", "for client in [self._clients[k] for k in self._asked]:\n            client.take("),
    M("who was away keeps its optimiser", "skew", "if self._in_step and twin.optimizer is not None:", "if not self._in_step and twin.optimizer is not None:"),
    M("the frozen server answers before it has trained", "skew", "self.train(server, smashed, this, turn, factor)\n        step = server.gradients(smashed, running_statistics=self.running_statistics)", "step = server.gradients(smashed, running_statistics=self.running_statistics)\n        self.train(server, smashed, this, turn, factor)"),
    # A contest of methods
    M("the larger of equal rates", "contest", "rate = max(sorted(found), key=found.__getitem__)", "rate = max(sorted(found, reverse=True), key=found.__getitem__)"),
    M("rates by test accuracy", "contest", "read(folder_of(out, trial, s), trial.at(s)).validation for trial", "read(folder_of(out, trial, s), trial.at(s)).best for trial"),
    M("the first trial decides", "contest", "if not all(is_trained(folder_of(out, *run)) for run in runs):", "if not any(is_trained(folder_of(out, *run)) for run in runs):"),
    M("rates are reported on the seed they were tried on", "contest", "replace(cell, seeds=(extent.tuning_seed,))", "replace(cell, seeds=extent.seeds[:1])"),
    M("trials and runs at once", "contest", "seeds=extent.seeds, trials=trials, turn=1)", "seeds=extent.seeds, trials=trials, turn=0)"),
    M("no setting stands for another", "contest", "dict(self.tuned_in).get(setting, setting)", "setting"),
    M("CL is trained in each setting", "contest", "'anywhere' if central else setting", "setting"),
    # Algorithms
    M("SplitLr multiplies by alpha", "algorithms", "clients**self.alpha", "clients * self.alpha"),
    M("SplitLr counts the others", "algorithms", 'self.alpha_clients == "enrolled"', 'self.alpha_clients != "enrolled"'),
    M("active count rounded down", "algorithms", "math.floor(self.phi * clients + 0.5)", "math.floor(self.phi * clients)"),
    M("initial phase a step too long", "algorithms", "done < round(self.phi_until, 9)", "done <= round(self.phi_until, 9)"),
    M("final phase a step too late", "algorithms", "done >= final", "done > final"),
    M("final phase from phi_until on", "algorithms", "round(1 - self.phi_until, 9)", "round(self.phi_until, 9)"),
    M("active clients drawn once a round", "algorithms", '"active", this.index, turn', '"active", this.index, 0'),
    M("progress by rounds alone", "algorithms", "(self.index * self.steps + step)", "(self.index * self.steps)"),
    M("a turn after the last batch", "algorithms", "turn < batches[k]", "turn <= batches[k]"),
    M("visits in the same order every round", "algorithms", '"visits", this.index', '"visits", 0'),
    M("mean over rows divided by clients", "algorithms", "total.sum(0, keepdim=True) / sum(sizes)", "total.sum(0, keepdim=True) / len(sizes)"),
    M("sum for mean over rows", "algorithms", "return total.mean(0, keepdim=True)", "return total.sum(0, keepdim=True)"),
    M("row mean over clients without the row", "algorithms", "return total / each.to(total.device, total.dtype)", "return total / len(sizes)"),
    M("sum of own gradients", "algorithms", '"union" if self.average_reduce == "sum" else self.gradient_scale', "self.gradient_scale"),
    M("unicast scaled as the common gradient", "algorithms", "_scaled_of(gradient, smashed, others, self.gradient_scale)", "_scaled_of(gradient, smashed, others, share)"),
    M("some clients' gradients scaled by their own rows", "algorithms", "scale, sum(smashed.masses))", "scale, sum(here.masses_of(sizes)))", "def _scaled_of("),
    M("common gradient's last rows", "algorithms", "else c[:size]", "else c[-size:]"),
    M("SFL averages every step", "algorithms", 'if self.average_every == "step":', "if True:", "class Sfl(Scaled"),
    M("SFL never averages by the round", "algorithms", 'if self.average_every == "round":', "if False:", "class Sfl(Scaled"),
    M("all clients weigh the same", "algorithms", "{k: masses[k] for k in sorted(who)}", "{k: 1 for k in sorted(who)}"),
    M("V1 forgets the server copies", "algorithms", "server.average_copies(sample_weights(clients, trained))", "pass", "class SflV1("),
    M("V1 forgets the clients", "algorithms", "clients.average(sample_weights(clients, trained))", "pass", "class SflV1("),
    M("V2 forgets the clients", "algorithms", "clients.average(sample_weights(clients, trained))", "pass", "class SflV2("),
    M("V2 in the same order every step", "algorithms", '"server order", this.index, turn', '"server order", this.index, 0'),
    M("V3 forgets the server copies", "algorithms", "server.average_copies(sample_weights(clients, trained))", "pass", "class SflV3("),
    M("PSL ignores the gradients' scale", "algorithms", "own(step.gradient, smashed, self.gradient_scale)", "own(step.gradient, smashed)", "class Psl(Scaled"),
    M("SSL always hands over the optimizer", "algorithms", "optimizer=self.hand_over_optimizer", "optimizer=True", "class Ssl("),
    M("U-shape sends labels", "algorithms", "labels=False", "labels=True", "class UShapedSsl("),
    M("SLR with phi", "algorithms", "own(step.gradient, smashed, self.gradient_scale)", "SplitAvg.split_average(Sglr(), step.gradient, smashed, smashed.clients)", "class Slr("),
    M("SGL with alpha", "algorithms", "server.step(smashed)", "server.step(smashed, float(len(smashed.clients)))", "class Sgl("),
    # Server
    M("server's loss is a sum", "server", "return mean_loss(losses, smashed.weights)", "return losses.sum()", "The loss of a step, from its rows' losses [R]."),
    M("server steps without SplitLr", "server", "self._take(self._rate(factor))", "self._take(self._rate(1.0))"),
    M("server steps without its schedule", "server", "self.lr * self.lr_factor * factor", "self.lr * factor"),
    M("server's gradients add up", "server", "p.grad = None", "pass", "def _backward(self, smashed"),
    M("server draws the same every step", "server", "self._steps += 1", "pass"),
    M("server copies without a schedule", "server", "self._copies[client].lr_factor = self.lr_factor", "pass"),
    M("server copies keep their models", "server", "load_moving(one.model, moving(self.model))", "pass", "average_into(self.model, copies"),
    M("server predicts in training mode", "server", "self.model.eval()", "pass", "in eval mode, for evaluation. All clients share"),
    M("server trains in evaluation mode", "server", "self.model.train(not evaluating)", "pass"),
    M("gradients in the order of visits", "server", "[done[k] for k in smashed.clients]", "list(done.values())"),
    M("server copies draw alike", "server", 'seeds.derive(self.seed, "copy", client)', "self.seed", "def _copy_of("),
    # Gradients and losses
    M("own scale upside down", "gradients", "g * (total / masses[0])", "g * (masses[0] / total)"),
    M("C for R over b", "gradients", "[total / mass if mass else 0.0 for mass in masses]", "[float(len(sizes)) for mass in masses]"),
    M("the first client's scale for all", "gradients", "len(set(masses)) == 1 and masses[0]", "masses[0]"),
    M("sum of a client's losses", "gradients", "values.view(len(sizes), -1).mean(1)", "values.view(len(sizes), -1).sum(1)"),
    M("sum of unequal clients' losses", "gradients", "torch.stack([part.mean() for part in", "torch.stack([part.sum() for part in"),
    M("mean of clients' means", "gradients", "(share @ own).view(1)", "own.mean().view(1)"),
    M("mean of clients' means, reported", "gradients", "[mean_loss(losses, weights).view(1), client_means", "[client_means(losses, sizes, weights).mean().view(1), client_means"),
    # Averaging
    M("first model weighs the same", "averaging", "first * (weights[0] / total)", "first * (1 / len(states))"),
    M("other models weigh the same", "averaging", "alpha=weight / total", "alpha=1 / len(states)"),
    M("smallest counter", "averaging", "torch.stack([s[name] for s in states]).amax(0)", "torch.stack([s[name] for s in states]).amin(0)"),
    M("weights by their largest", "averaging", "total = sum(weights)", "total = max(weights)"),
    # The local engine, and what all engines share
    M("client's gradients add up", "local", "p.grad = None", "pass", "class Client:"),
    M("client trains in evaluation mode", "local", "self.module.train()", "pass", "class Client:"),
    M("client draws the same every step", "local", '"forward", self.called, clock', '"forward", self.called, 0'),
    M("clients draw alike", "local", '"forward", self.called, clock', '"forward", 0, clock'),
    M("tail draws the same every step", "local", '"tail", self.called, self.clock', '"tail", self.called, 0'),
    M("client's loss is a sum", "local", "mean_loss(self.task.row_losses(outputs, self.labels), self.task.weights(self.labels))", "self.task.row_losses(outputs, self.labels).sum()"),
    M("model left behind", "local", "load_moving(taker.module, moving(giver.module))", "pass"),
    M("optimizer taken along unasked", "local", "if optimizer and giver.optimizer and taker.optimizer", "if giver.optimizer and taker.optimizer"),
    M("still alike after a step", "local", "self._alike = len(self._clients) == 1", "pass", "class LocalCohort"),
    M("a client misses the average", "local", "for module in everybody[1:]:", "for module in everybody[2:]:"),
    M("loss per batch in evaluation", "local", "losses.sum(1) if weights is None", "losses.mean(1) if weights is None"),
    M("client evaluated in training mode", "local", "client.module.eval()", "pass", "def outputs_with("),
    M("a local step too many", "local", "self._quota[client.name] > 0", "self._quota[client.name] >= 0", "def _fit_one("),
    M("a batch too many", "local", "self._quota[list(asked)] > 0", "self._quota[list(asked)] >= 0"),
    M("clients without a schedule", "local", "self._rate = s.lr * lr_factor", "self._rate = s.lr"),
    M("one local epoch", "local", "self.local_epochs * per_epoch", "per_epoch"),
    M("local loss unweighted", "local", "sum(step.loss * step.mass for step in here.values()) / (mass or 1)", "sum(step.loss for step in here.values()) / len(here)"),
    M("participants rounded down", "local", "math.floor(fraction * clients + 0.5)", "math.floor(fraction * clients)"),
    M("participants drawn once", "local", '"participants", index', '"participants", 0'),
    # The stacked engine
    M("stack averages unweighted", "stack", "(share / share.sum())", "(torch.ones_like(share) / len(share))"),
    M("stack's smallest counter", "stack", "return rows.amax(0)", "return rows.amin(0)"),
    M("stack counts no steps", "stack", "self.steps[who] += 1", "pass"),
    M("buffers not put back", "stack", "((self._parameters, group.parameters), (self._buffers, group.buffers))", "((self._parameters, group.parameters),)"),
    M("no decay in a factored step", "stack", "beta=keep, alpha=scale", "beta=1.0, alpha=scale"),
    M("decay at every use", "stack", "keep = 1.0", "pass", "part.add_to(p, keep, -lr)"),
    M("no decay by hand", "stack", "p.grad.add(p, alpha=decay) if decay else p.grad", "p.grad"),
    M("decay without the rate", "stack", "weight.mul_(1.0 - lr * weight_decay)", "weight.mul_(1.0 - weight_decay)"),
    M("rehearsal leaves a trace", "stack", "{name: b.clone() for name, b in real.items()}", "dict(real)"),
    M("optimizer's clock a step ahead", "stack", "torch.tensor(float(taken)", "torch.tensor(float(taken + 1)"),
    M("one clock for all optimizers", "stack", "counts = np.unique(taken)", "counts = taken[:1]"),
    M("factors add up", "stack", "group.factors.clear()", "pass"),
    M("stack's gradients add up", "stack", "p.grad = None", "pass", "class Stack:"),
    M("stack trains in evaluation mode", "stack", "self.module.train()", "pass", "class Stack:"),
    M("rows merged by the inverse order", "stack", "torch.from_numpy(np.argsort(places))", "torch.from_numpy(places)"),
    M("mean over clients' losses", "stack", "own.sum().backward()", "own.mean().backward()"),
    M("stack still alike after a step", "stack", "self._alike = len(self._quota) == 1", "pass", "class StackedCohort"),
    M("alike in the second local step", "stack", "self._alike, count = len(self._quota) == 1, count + 1", "self._alike, count = alike, count + 1"),
    M("stack draws the same every step", "stack", "named = (name, self.setup.called(client), self._clocks[client])", "named = (name, self.setup.called(client), 0)"),
    M("stacked copies draw the same", "stack", '("server", int(self._stack.batches[client]))', '("server", 0)'),
    M("server's own model left as it was", "stack", "self.model.load_state_dict(self._stack.state_of(0))", "pass"),
    M("independent starts lost", "stack", "if not setup.alike:", "if setup.alike:"),
    # Kernels
    M("mean for sum in a bias", "kernels", "by_bias = g.sum(1, dtype=weight.dtype)", "by_bias = g.mean(1, dtype=weight.dtype)"),
    M("mean for sum in a convolution's bias", "convolutions", "by_bias = g.sum(1, dtype=ctx.dtype)", "by_bias = g.mean(1, dtype=ctx.dtype)"),
    M("padding of the other axis", "convolutions", "(left, left, top, top)", "(top, top, left, left)"),
    M("dilation forgotten", "convolutions", "(row * self.dilation[0], column * self.dilation[1])", "(row, column)"),
    M("vertical stride for both", "convolutions", "zip(first, self.stride, size, strict=True)", "zip(first, self.stride[:1] * 2, size, strict=True)"),
    M("first client's weights for all", "convolutions", "w.unbind(0), shifts, strict=True)", "[w[0]] * len(w), shifts, strict=True)"),
    # Lowering
    M("dropout without its scale", "lowering", "input * keep.div_(1 - p)", "input * keep"),
    M("dropout of the first client for all", "lowering", "generator=mode.generator(client)", "generator=mode.generator(0)"),
    M("dropout of what is to be kept", "lowering", "mine.bernoulli_(1 - p", "mine.bernoulli_(p"),
    M("dropout within a channel", "lowering", "_drop(mode, input, (*input.shape[:2], *[1] * (input.dim() - 2)), p, inplace)", "_drop(mode, input, input.shape, p, inplace)"),
    M("embeddings of the neighbour", "lowering", "torch.arange(mode.clients, device=input.device) * weight.shape[1]", "torch.arange(mode.clients, device=input.device) * (weight.shape[1] - 1)"),
    M("padding is trained", "lowering", "torch.where(padding, found.detach(), found)", "found"),
    M("embedding's special gradients ignored", "lowering", "if max_norm is not None or scale_grad_by_freq or sparse:", "if max_norm is not None or sparse:"),
    # Operations for vmap
    M("mapped dropout without its scale", "mapping", "mode.mask(input, input.shape, p) / (1 - p)", "mode.mask(input, input.shape, p)"),
    M("mapped dropout within a channel", "mapping", "mode.mask(input, size, p) / (1 - p)", "mode.mask(input, input.shape, p) / (1 - p)"),
    M("one generator's masks for all", "mapping", "generator = make()", "generator = generators[0]()"),
    M("mapped attention unscaled", "mapping", "math.sqrt(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)", "1.0"),
    M("mapped attention sees what is to come", "mapping", "if is_causal:", "if False:", "step by step, with `drop` for its dropout"),
    M("mapped padding is trained", "mapping", "torch.where((input == padding_idx % len(weight)).unsqueeze(-1), found.detach(), found)", "found"),
    M("mapped alpha dropout drops to zero", "mapping", "(mask - 1) * (_ALPHA * a) + _ALPHA * a * p", "0.0"),
    # The union step
    M("union unweighted", "union", "spread(shares(self.masses, self._asked), self._sizes)", "spread([1 / len(self._asked)] * len(self._asked), self._sizes)", "The weighted mean of the steps that the clients of the last"),
    M("union's sum for mean", "union", "return values / masses if weights is None", "return values if weights is None"),
    M("union server's slices unscaled", "union", "own = tuple(g / column(share, g) for g in gradient)", "own = gradient"),
    M("union although rows draw", "union", "return not drew and close(", "return close("),
    M("union although buffers are kept", "union", "if list(part.buffers()):", "if False:"),
    # The choice of the engine
    M("union from unequal starts", "choice", 'self.config.start != "equal" or not rule_of', "not rule_of"),
    M("union where averaged by the round", "choice", 'return self.average_every == "step"', "return True", "class Sfl(Scaled"),
    M("union of several local steps", "choice", "return self.local_steps == 1", "return self.local_steps is not None", "class FedAvg("),
    M("union whatever the client's optimizer", "choice", "or not rule_of(make).plain", ""),
    M("V1's union whatever the server's optimizer", "choice", "rule_of(make_server).plain and row_by_row(", "row_by_row("),
    M("momentum is plain", "choice", 'd["momentum"] or ', ""),
    M("ascent is plain", "choice", ' or d["maximize"]', ""),
    M("memory for one client is enough", "choice", "keep=each * taking_part <= limit", "keep=each <= limit"),
    M("server copies on the stack of Adafactor", "choice", "for make in (self._makes[side] for side in self._stacked):", 'for make in (self._makes["clients"],):'),
    # The ledger
    M("broadcast saves all", "ledger", "count * (len(clients) - 1)", "count * len(clients)"),
    M("every common gradient in the paper's count", "ledger", "0 if self._common_seen else count // rows", "count // rows"),
    M("one common gradient in all rounds", "ledger", "self._common_seen = False", "pass", "Participants that missed an averaging fetch the averaged model first."),
    M("paper's count with unicast copies", "ledger", "count - self._common + self._common_once", "count + self._common_once"),
    M("nobody is late", "ledger", "self._stale = set(range(len(self.samples))) - set(averaged)", "self._stale = set()"),
    M("the late fetch again and again", "ledger", "self._stale -= set(late)", "pass"),
    M("handed over without the optimizer", "ledger", "size.model + (size.optimizer if optimizer else 0)", "size.model"),
    M("evaluation is training", "ledger", "(kind is None and k not in _APART)", "kind is None"),
    M("labels cross in the U-shape's evaluation", "ledger", 'if self.shape == "u-shaped":', "if False:", "def metered("),
    M("tied weights cross twice", "ledger", "sum({t.data_ptr(): t.nbytes for t in moving(module).values()}.values())", "sum(t.nbytes for t in moving(module).values())"),
    M("optimizer's clock weighs nothing", "stack", "(8 if self._plain_clock else 4) * len(self._state) if self._clocked else 0", "0"),
    M("own gradients through the wrong codec", "coding", "self._cross(\"down\", self.coding.down, rows", "self._cross(\"down\", self.coding.up, rows"),
    # The clock, energy, the fleet
    M("server waits for all", "clock", "self.ready[who].max()", "self.ready.max()"),
    M("U-shape's server passes counted twice", "clock", "server.backward if self._tail_done else self.server_flops", "self.server_flops"),
    M("tails only go forward", "clock", "[f.tail.training for f in own]", "[f.tail.forward for f in own]"),
    M("U-shape's server skips forward", "clock", "self.clock.serve(float(sizes.sum()) * self.flops.server.forward)", "pass"),
    M("uploads without latency", "clock", "float(self.ready[who].max()) + self.fleet.latency", "float(self.ready[who].max())"),
    M("downloads before the client is ready", "clock", "comes = np.maximum(self.ready, self.server + self.fleet.latency)", "comes = np.zeros_like(self.ready) + self.server + self.fleet.latency"),
    M("sleep is waiting", "clock", "self.asleep[waking] += woken[waking] - self.ready[waking]", "pass"),
    M("uploads share nothing", "clock", "self._passing(\"up\", self.ready, bits, bits.sum())", "self._passing(\"up\", self.ready, bits, bits)"),
    M("full batches only", "clock", "epochs * n + rest * self.batch", "batches * self.batch"),
    M("local steps begin anew every round", "clock", "self._fitted[client] += count if draw else 0", "pass"),
    M("bytes for bits, up", "clock", "8.0 * (self._sent[0] - up)", "self._sent[0] - up"),
    M("energy of the last direction", "clock", "base + watts * float(seconds.sum())", "watts * float(seconds.sum())"),
    M("bytes for megabits", "clock", "per_mbps * float(bits.sum()) / 1e6", "per_mbps * float(bits.sum()) / 8e6"),
    M("stragglers rounded down", "clock", "math.floor(options.stragglers * clients + 0.5)", "math.floor(options.stragglers * clients)"),
    M("stragglers are faster", "clock", "1 / options.straggler_slowdown", "options.straggler_slowdown"),
    M("slowed devices save energy", "clock", "(use.flops / fleet.speeds).sum() * device.watts", "use.flops.sum() / fleet.speeds.max() * device.watts"),
    M("a message goes on in a gap", "traces", "waited += max(0.0, begin - now)", "pass"),
    M("rates of the first interval", "traces", "rate = min(rates[number], most)", "rate = min(rates[0], most)"),
    M("no narrow server beside a trace", "traces", "rate = min(rates[number], most)", "rate = rates[number]"),
    M("an interval holds its end", "traces", "first = bisect_right(one.ends, local)", "first = bisect_right(one.begins, local) - 1"),
    M("one whole period too many", "traces", "many = max(0, math.floor(bits / each) - 1)", "many = max(0, math.floor(bits / each) + 1)"),
    M("rows may overlap", "traces", "if other.begin < one.end:", "if False:"),
    M("the fraction is of all clients", "traces", "draw_participants(seed, index, len(present), fraction)", "draw_participants(seed, index, clients, fraction)"),
    M("the late are not waited for", "traces", "self.server = begins", "self.server = self.server"),
    M("rounds begin while clients sleep", "traces", "self.here[:] = False", "pass"),
    M("waits are forgotten in checkpoints", "traces", "self.attendance.load(found.attendance)", "pass"),
    # Checkpoints
    M("server forgets its steps", "checkpoint", "self._steps = own.steps", "pass"),
    M("server forgets its optimizer", "checkpoint", 'restore_optimizer(self._optimizer, own.optimizer, "the server\'s optimiser")', "pass"),
    M("server forgets its copies", "checkpoint", "self._copy_of(int(client)).load(copy)", "pass"),
    M("client forgets its optimizer", "checkpoint", 'restore_optimizer(client.optimizer, own.optimizer, f"the optimiser of client {k}")', "pass"),
    M("optimizer's state cast", "checkpoint", "optimizer.state[p] = {n: laid_as(v.clone(), p) if isinstance(v, Tensor) else v for n, v in values.items()}", "pass"),
    M("batches begin anew", "checkpoint", "self.drawn[:] = state.drawn", "pass"),
    M("equal although resumed", "checkpoint", "self._holder, self._alike = state.holder, state.alike", "self._holder = state.holder"),
    M("stack forgets its steps", "checkpoint", 'self.steps = np.array(state["steps"], np.int64)', "pass"),
    M("stack forgets its optimizers' clocks", "checkpoint", 'self._clocked = state["clocked"]', "pass"),
    M("samples begin anew", "checkpoint", "self._samples, self._seconds = state.samples, state.seconds", "self._seconds = state.seconds"),
    M("a round again", "checkpoint", "self._state(index + 1, folder)", "self._state(index, folder)"),
    M("records are not cut back", "checkpoint", "world().first(lambda: folder.truncate(offsets))", "pass"),
    M("ledger forgets who is late", "checkpoint", "self._stale, self._at_work = set(found.stale), set(found.at_work)", "self._at_work = set(found.at_work)"),
    M("ledger forgets common gradients", "checkpoint", "self._common, self._common_once = found.common", "pass"),
    M("clock forgets who is here", "checkpoint", "self.here = np.array(found.here, bool)", "pass"),
    # Partitions
    M("shards of rows, not labels", "partitions", 'np.argsort(labels[order], kind="stable")', "np.arange(len(order))"),
    M("shards in order", "partitions", 'seeds.generator(seed, "partition", "shards").permutation(total)', "np.arange(total)"),
    M("iid in order", "partitions", "np.array_split(order, clients)", "np.array_split(np.sort(order), clients)"),
    M("alpha upside down", "partitions", "float(self.dirichlet_alpha)", "1 / float(self.dirichlet_alpha)"),
    M("the same draw ten times", "partitions", '"partition", "dirichlet", attempt', '"partition", "dirichlet"'),
    M("square is linear", "partitions", '"square": np.square', '"square": np.positive'),
    M("samples for one client", "partitions", "order[: clients * samples_per_client]", "order[:samples_per_client]"),
    M("all samples are too many", "partitions", "samples_per_client * clients > rows", "samples_per_client * clients >= rows"),
    M("as many clients as samples are too many", "partitions", "if clients > rows:", "if clients >= rows:"),
    M("rows unsorted", "partitions", "[np.sort(hand.astype(np.int64)) for hand in hands]", "[hand.astype(np.int64) for hand in hands]"),
    # Classes and clients
    M("the gap to the worst", "fairness", "max(defined) - statistics.fmean(defined)", "statistics.fmean(defined) - min(defined)"),
    M("forgotten since the first", "fairness", "now - max(defined)", "now - defined[0]"),
    M("forgotten on other rows", "fairness", 's.own if where == "own" else s.test', "s.own"),
    M("classes behind the mean", "fairness", "max(value for value in found if isinstance(value, float)) - mean", "mean"),
    # Momentum of the server copies
    M("momentum is not shared", "momentum", "server.average_momentum(sample_weights(clients, smashed.clients))", "pass"),
    M("momentum alike", "momentum", "weight / total) for weight, u in kept", "1 / len(kept)) for weight, u in kept"),
    M("stacked momentum alike", "momentum", "share = [weight / total for weight in stepped.values()]", "share = [1 / len(stepped)] * len(stepped)"),
    M("only the first takes it", "momentum", "for _, u in kept:", "for _, u in kept[:1]:"),
    # Orders of SplitFed V2
    M("sequential is interleaved", "order", 'if self.server_order == "sequential"', "if not self.server_order"),
    M("clients in order", "order", "_shuffled(this, 0, this.clients)", "this.clients"),
    M("one batch of each client", "order", "while smashed := clients.forward([client]):", "if smashed := clients.forward([client]):"),
    # Codecs
    M("top-k rounds down", "codecs", "math.ceil(self.fraction * m)", "int(self.fraction * m)"),
    M("top-k by sign", "codecs", "flat.abs().topk(k", "flat.topk(k"),
    M("rand-top-k never draws", "codecs", "if not self.chance or k == m:", "if True:"),
    M("rand-top-k drops NaN", "codecs", "kept = k - drawn * flat.isfinite().all(1, keepdim=True)", "kept = k - drawn"),
    M("rand-top-k always leaves out the same", "codecs", "largest = largest.gather(1, keys.gather(1, largest).argsort(1))", "largest = largest.sort(1).values"),
    M("rand-top-k draws for held-out samples", "codecs", "replace(self, zstd=False, chance=0.0)", "replace(self, zstd=False)"),
    M("rows share a seed", "codecs", "_counting(flat.shape[1], flat.device)).sum(1)", "_counting(flat.shape[1], flat.device)).sum().expand(len(flat))"),
    M("the gradient comes back in full", "codecs", "received if self.coding.up.gradient_on_support else ()", "()"),
    M("int8 cuts off", "codecs", "q.round_().to(torch.int8)", "q.to(torch.int8)"),
    M("int8 overflows", "codecs", "largest = 127.0001", "largest = 128.0"),
    M("float16 overflows", "codecs", "x.clamp(-largest, largest)", "x"),
    M("float8 by half", "codecs", "scale.mul_(256)", "scale.mul_(128)"),
    M("halves of halves", "codecs", "dtype.itemsize >= 4", "dtype.itemsize >= 2"),
    M("positions wrap", "codecs", "torch.uint16 if m <= 1 << 16", "torch.uint16 if m <= 1 << 17"),
    M("a position beyond the row", "codecs", "int(at.max()) >= m", "int(at.max()) > m"),
    M("positions twice", "codecs", "(at.diff(dim=1) > 0).all()", "(at.diff(dim=1) >= 0).all()"),
    # Coding
    M("bytes in equal shares", "coding", "payload_bytes(codec, (size, *tensor.shape[1:]), tensor.dtype) for size in sizes", "payload_bytes(codec, tuple(tensor.shape), tensor.dtype) // len(sizes) for size in sizes"),
    M("clients share a scale", "coding", "return dimensions == 2", "return dimensions >= 2"),
    M("bytes before zstandard", "coding", "len(compressed(data)) if codec.zstd else len(data)", "len(data)"),
    M("common gradient through the wrong codec", "coding", "self.rows(self.down, rows,", "self.rows(self.up, rows,"),
    M("evaluation compressed", "coding", "up, down = self.coding.up.evaluating, self.coding.down.evaluating", "up, down = self.coding.up, self.coding.down"),
    M("bytes of the last tensor alone", "coding", "counts += np.array(sizes, np.int64) * each", "counts = np.array(sizes, np.int64) * each"),
    # Defences
    M("nothing trimmed at the top", "robust", "drop : len(models) - drop]", "drop:]"),
    M("trimmed models rounded down", "robust", "math.ceil(self.trim * models - 1e-9)", "int(self.trim * models)"),
    M("short updates made longer", "robust", "(bound / lengths.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)", "bound / lengths.clamp(min=torch.finfo(torch.float64).tiny)"),
    M("origin of the first averaging for ever", "robust", "return average(models, weights, self.setup.rule, self._average or self._first)", "return average(models, weights, self.setup.rule, self._first)"),
    M("copies by the mean", "robust", "self._stack.average(weights, self.rule, self.model.state_dict())", "self._stack.average(weights)"),
    M("median of all rows", "robust", "self.row_multiple * float(medians(lengths, sizes).median())", "self.row_multiple * float(lengths.median())"),
    M("gradient along the row", "robust", "(g - column(dots, g) * u)", "g"),
    M("gradient not shortened", "robust", "column(self.factors[number], g) * (g - column(dots, g) * u)", "g - column(dots, g) * u"),
    M("screened gradients by their places", "robust", "torch.zeros_like(u).index_add(0, place, g.to(u))", "g.to(u)"),
    M("a bound of the first row for all", "robust", "most = bound[long]", "most = bound[:1].expand(len(long))"),
    M("screened rows keep their graph", "robust", "return Screened(tuple(u.detach() for u in used), _Graph", "return Screened(used, _Graph"),
    M("relative screenings where clients take turns", "robust", 'when = "together" if made.compares else "split"', 'when = "split"'),
    M("gradients of tails screened by fixed bounds", "robust", "if not self.rule.compares:", "if not self.rule.active:"),
    M("negative bounds taken", "robust", " or bool((found < 0).any()):", ":"),
    M("named again and again", "robust", "self._named.add(k)", "pass"),
    M("hostile models judged", "robust", "honest = [k for k in asked if k not in self.attacks.hostile]", "honest = list(asked)"),
    M("steps that wait when a model leaves", "robust", "self.engine.settle()", "pass"),
    M("the same noise every round", "robust", '"attack", what, client, self._round, step)', '"attack", what, client, step)'),
    M("dropout loses the mean", "defences", ">= probability) / (1 - probability)", ">= probability).float()"),
    M("short rows made longer", "defences", "_length(rows, 1 if self.laplace_noise else 2).clamp(min=self.clip)", "_length(rows, 1 if self.laplace_noise else 2)"),
    M("Laplace by the Euclidean norm", "defences", "1 if self.laplace_noise else 2", "2"),
    M("noise not in units of the clip", "defences", "(self.clip or 0.0) * (self.gaussian_noise or self.laplace_noise)", "(self.gaussian_noise or self.laplace_noise)"),
    M("the same noise every batch", "defences", 'self._draw("step", k, t, *name)', 'self._draw("step", k, *name)'),
    M("the same noise for all clients", "defences", 'self._draw("step", k, t, *name)', 'self._draw("step", t, *name)'),
    M("the same noise in all of evaluation", "defences", "seen.update(dict.fromkeys(clients, len(rows[0]) // len(clients)))", "pass"),
    M("penalty without its weight", "defences", "g + part.weight * s", "g + s"),
    M("one-sided noise", "defences", "return one - two", "return one"),
    M("correlation without a root", "defences", "(a.square().mean() * b.square().mean()).sqrt()", "(a.square().mean() * b.square().mean())"),
    M("evaluation unprotected", "defences", "return predict(clients, sent)", "return predict(clients, rows)"),
    M("inputs of earlier batches", "defences", "self._drawn.clear()", "pass"),
    # Batches
    M("remainder never dealt", "batches", "-(-self.counts // batch)", "np.maximum(1, self.counts // batch)"),
    M("shuffled from the last order", "batches", "order.permutation(self._rows[span])", "order.permutation(self._order[span])"),
    M("the same order every epoch", "batches", '"batches", self.names[client], epoch', '"batches", self.names[client], 0'),
    M("order by place, not by name", "batches", '"batches", self.names[client], epoch', '"batches", client, epoch'),
    M("shuffled only at first", "batches", "if now != self._epoch[k]:", "if self._epoch[k] < 0:"),
    # Seeds
    M("names run together", "seeds", '"/".join(str(part) for part in (seed, *name))', '"".join(str(part) for part in (seed, *name))'),
    M("caller's random state lost", "seeds", "torch.set_rng_state(before)", "pass", "def torch_seeded("),
    M("names ignored", "seeds", "torch.default_generator.manual_seed(derive(seed, *name))", "torch.default_generator.manual_seed(seed)"),
    M("evaluated clients are the first", "seeds", 'seeds.generator(seed, "evaluated clients").choice(clients, count, replace=False)', "torch.arange(count)"),
    # Rates and schedules
    M("decay a round late", "schedules", "progress >= at", "progress > at"),
    M("one decay for all", "schedules", "sum(progress >= at for at in self.lr_decay_at)", "any(progress >= at for at in self.lr_decay_at)"),
    M("cosine from two", "schedules", "0.5 * (1 + math.cos(math.pi * progress))", "(1 + math.cos(math.pi * progress))"),
    M("schedule a round early", "schedules", "_factor(clients, index / training.rounds)", "_factor(clients, (index + 1) / training.rounds)"),
    M("server without a schedule of its own", "schedules", "config.server_lr_schedule or config.lr_schedule", "config.lr_schedule"),
    M("server without a rate of its own", "schedules", "lr, copies = config.server_lr or config.client_lr,", "lr, copies = config.client_lr,"),
    M("reported rate without the schedule", "schedules", "c.client_lr * client_factor", "c.client_lr"),
    # Before the step of an optimiser
    M("warm-up a round early", "training", "(progress * self.rounds + 1) / (rising + 1)", "(progress * self.rounds + 1) / rising"),
    M("no schedule after the warm-up", "training", "(progress - self.warmup) / (1 - self.warmup)", "progress"),
    M("sums for means", "training", "p.grad.div_(self._waiting)", "pass"),
    M("stacked sums for means", "training", "self._sum_of(name, due) / batches.to", "self._sum_of(name, due) / torch.ones_like(batches).to"),
    M("stacked gradients never forgotten", "training", "held[at] = 0.0", "pass"),
    M("server forgets what waits", "training", "self._stepping.settle()\n        self._settle_copies()", "self._settle_copies()"),
    M("stack clips all clients together", "training", "torch.linalg.vector_norm(norms, dim=0)", "torch.linalg.vector_norm(norms)"),
    M("the last group that matches", "training", "next((group for group in self.groups if group.has(name)), None)", "next((group for group in self.groups[::-1] if group.has(name)), None)"),
    M("groups at the base rate", "training", 'group["lr"] = lr * group.get("lr_factor", 1.0)', 'group["lr"] = lr'),
    M("groups at the base rate, stepped by hand", "training", 'rate, decay = lr * group.get("lr_factor", 1.0),', "rate, decay = lr,"),
    M("own optimisers stacked unproved", "training", "if why := unlike_alone(make):", "if False:"),
    M("union with clipping", "training", "if make.clip is not None or", "if False or"),
    # Frozen parameters
    M("frozen parameters are averaged", "frozen", "load_moving(target, average([moving(m) for m in models], weights, rule, origin))", "target.load_state_dict(average([m.state_dict() for m in models], weights, rule, origin))"),
    M("frozen parameters weigh something", "frozen", "t.nbytes for t in moving(module).values()", "t.nbytes for t in module.state_dict().values()"),
    M("a frozen tensor for each client", "frozen", "(*replica(nn.ModuleList(ends)), None)", "(*copy.deepcopy(nn.ModuleList(ends)), None)"),
    M("gradients for clients that train nothing", "frozen", "if self.trains:\n            self.inner.backward(", "if True:\n            self.inner.backward("),
    M("gradients for frozen lower parts", "frozen", "return gradients.without_rows()", "pass"),
    M("tails that miss their steps", "frozen", "if self.trains:\n            self.inner.backward(", "if self.lower_trains:\n            self.inner.backward("),
    M("a plan with gradients for frozen lower parts", "frozen", "gradient=down if self.lower_trains else 0", "gradient=down"),
    M("answers only when somebody waits", "reading", "self._waiting.setdefault(request)\n        self._send()", "self._waiting.setdefault(request)"),
    M("items beyond the round are read", "reading", "if turn < some:", "if True:"),
    M("an epoch looked into in another order", "reading", "if self._early.get(client, (None,))[0] != epoch:", "if client not in self._early:"),
    M("all answers at once", "reading", "self._waiting and len(self._sent) < self.depth", "self._waiting"),
    M("untrained clients stay alike", "frozen", "(not trains(lower, tail) and any(True for _ in lower.buffers()))", "False"),
    M("frozen weights are not compared", "frozen", "if frozen := digest(*p.clients.models[client]):", "if False:"),
    M("frozen weights are not resumed", "frozen", "load_resting(self._stack.module, found.frozen)", "pass"),
    M("kept rows of another batch", "features", "self.inner.seek(k, self._drawn[k] - 1)", "self.inner.seek(k, self._drawn[k])"),
    M("a lost batch is taken for known", "features", "not self._kept[k].seen[drawn[k]].all()", "False"),
    M("kept rows without dropout's check", "features", 'if drew:\n        return "the', 'if False:\n        return "the'),
    M("kept rows are not resumed", "features", "self.computed, self._width = found.computed, found.width", "self._kept = {}\n        self.computed, self._width = found.computed, found.width"),
    M("remote clients do not seek", "features", "self._batches.drawn[0] = message.batch", "pass"),
    # Other operations that algorithms may use
    M("U-shaped clients count alike", "server", "[mass / (sum(masses) or 1) for mass in masses]", "[1 / len(masses) for mass in masses]"),
    M("U-shaped clients' gradients unweighted", "server", "if len(share) > 1:", "if False:"),
    M("gradients alone take a step", "server", "self._through(smashed, loss, None, evaluating=running_statistics)", "self._through(smashed, loss, 1.0, evaluating=running_statistics)"),
    M("running statistics move", "server", "self._through(smashed, loss, None, evaluating=running_statistics)", "self._through(smashed, loss, None, evaluating=False)"),
    M("a step on made-up rows at the base rate", "server", "self._through(made_up, loss, factor)", "self._through(made_up, loss, 1.0)"),
    M("no step on made-up rows", "server", "self._through(made_up, loss, factor)", "self._through(made_up, loss, None)"),
    M("a local step on the head too many", "local", "len(taken) < steps and", "len(taken) <= steps and"),
    M("pending batch forwarded anew", "local", "if not client.smashed:", "if True:", "def _learn_one("),
    M("pending batch left alone", "local", "(client.smashed or self._quota[client.name] > 0)", "self._quota[client.name] > 0"),
    M("a batch that was sent goes forward again", "clock", "drawn - waiting", "drawn"),
    # Tasks: losses and weights of rows
    M("class weights not divided out", "tasks", "return weighted / torch.where(counts > 0, counts, torch.ones_like(counts))", "return weighted"),
    M("ignored classes count", "tasks", "else targets != self.ignore_index", "else torch.ones_like(targets, dtype=torch.bool)"),
    M("weights of classes forgotten", "tasks", "return torch.where(counting, each[", "return torch.where(counting, torch.ones_like(each)["),
    M("a token is judged by itself", "tasks", "(outputs[:, :-1], targets[:, 1:]) if self.next_token", "(outputs[:, 1:], targets[:, 1:]) if self.next_token"),
    M("the first token counts", "tasks", "self.counts(targets[:, 1:] if self.next_token else targets)", "self.counts(targets)"),
    M("rows of few pixels count fully", "tasks", "else counts.flatten(1).sum(1)", "else torch.ones_like(counts.flatten(1).sum(1))"),
    M("rows of few pixels lose less", "tasks", "(losses * counts).flatten(1).sum(1) / torch.where(total > 0, total, torch.ones_like(total))", "(losses * counts).flatten(1).mean(1)"),
    M("balanced, but not for the number of classes", "tasks", "len(counted) / (scored * each.clamp(min=1))", "len(counted) / each.clamp(min=1)"),
    M("auxiliary heads count fully", "tasks", "total + weight * self.losses(output, targets)", "total + self.losses(output, targets)"),
    M("positive labels count once", "tasks", "pos_weight=weight, reduction", "pos_weight=None, reduction"),
    M("counts predicted as logarithms", "tasks", 'return outputs.exp() if self.loss == "poisson" else outputs', "return outputs"),
    M("less is better for all metrics", "tasks", "(1 if self.maximise else -1)", "-1"),
    M("not a number is the best score", "tasks", "return defined, (score or 0.0)", "return True, (score or 0.0)"),
    M("loss of a step unweighted", "tasks", "return mean_loss(losses, smashed.weights)", "return losses.mean()", "The loss of a step, from its rows' losses [R]."),
    M("loss of a step by rows", "tasks", "(losses * weights).sum() / _positive(weights.sum())", "(losses * weights).sum() / len(losses)"),
    M("nothing divided by nothing", "tasks", "return torch.where(total > 0, total, torch.ones_like(total))", "return total", "def _positive("),
    M("losses of clients unweighted", "tasks", "client_means(losses, sizes, weights)])", "client_means(losses, sizes)])"),
    M("made-up rows unweighted", "tasks", "weights=self.task.weights(labels))", "weights=None)"),
    M("clients count their rows", "tasks", "part.sum().item() for part in weights.double()", "float(len(part)) for part in weights.double()"),
    M("one client's rows unweighted", "tasks", "weights=None if self.weights is None else self.weights[start:stop]", "weights=None"),
    M("averaging by rows", "tasks", "masses = clients.masses", "masses = clients.samples"),
    M("averaging by rows, in a simulation", "tasks", "[mass_of(self.setup.task, self.setup.data.y, rows) for rows in self.setup.rows]", "[float(len(rows)) for rows in self.setup.rows]"),
    M("server copies without a task", "tasks", 'seeds.derive(self.seed, "copy", client), self.task,', 'seeds.derive(self.seed, "copy", client), None,'),
    M("reported losses of copies by rows", "tasks", "means_of_clients(losses, smashed.masses)", "means_of_clients(losses, smashed.sizes)"),
    M("clients' losses unweighted", "tasks", "mean_loss(self.task.row_losses(outputs, self.labels), self.task.weights(self.labels))", "self.task.row_losses(outputs, self.labels).mean()"),
    M("local losses by rows", "tasks", "sum(step.loss * step.mass for step in here.values()) / (mass or 1)", "sum(step.loss * step.rows for step in here.values()) / sum(step.rows for step in here.values())"),
    M("stacked clients' losses unweighted", "tasks", "client_means(losses, [len(losses) // clients] * clients, task.weights(targets))", "client_means(losses, [len(losses) // clients] * clients)"),
    M("stacked clients' losses by rows", "tasks", "masses_of(task.weights(batch.y), self._sizes)", "masses_of(None, self._sizes)"),
    M("evaluated loss unweighted", "tasks", "(losses * weights.to(losses.dtype)).sum(1)", "losses.sum(1)"),
    M("evaluated loss by rows", "tasks", "self._mass += len(targets) if weights is None else weights.double().sum().item()", "self._mass += len(targets)"),
    M("rows of the union unweighted", "tasks", "values * weights.to(values) / masses", "values / masses"),
    M("union's shares of rows", "tasks", "for mass in masses_of(weights, sizes)], sizes).to(values)", "for mass in sizes], sizes).to(values)"),
    # What remote clients report
    M("refusals are not counted", "client", "self.answers.refused(frame)", "pass"),
    M("rows sent are not counted", "client", "self.rows += said.rows if", "self.rows += 0 if"),
    M("no limit is a limit of nothing", "client", "if most is not None:\n                    allowed.add_metric((client.name, item), most)", "allowed.add_metric((client.name, item), most or 0)"),
    M("epsilon of all that is allowed", "client", "statement(noise, spent, delta).epsilon if spent else 0.0", "statement(noise, 2 * spent, delta).epsilon if spent else 0.0"),
    M("any targets are taken", "worker", "if labels and (odd :=", "if False and (odd :="),
    M("classes below 0 are scored", "worker", "(counted >= 0) & (counted < scored)", "counted < scored"),
    M("a remote client counts its rows", "worker", "mass, own = mass_of(d.task, d.samples.y),", "mass, own = float(len(d.samples.y)),"),
    M("what a client counts is not heard", "worker", "samples[client], setup.masses[client] = hello.samples, hello.mass", "samples[client], setup.masses[client] = hello.samples, 1.0"),
    M("no trial of large numbers", "hostile", "if not strange.any():", "if True:"),
    M("no second step in a trial", "hostile", "taken += [server.gradients(one) for one in steps]", "pass"),
    M("all are excluded that fail alone", "hostile", "if rest or (len(clients) == 1 and self._fits()):", "if True:"),
    M("what a holder was given is forgotten", "hostile", "given[holder] if given else self._handed", "given[holder] if given else ()"),
    M("any number of samples", "hostile", "numbers[client] > MULTIPLE * usual", "False"),
    M("masses are believed", "hostile", "(self.setup.counts_alike and mass != rows)", "False"),
    M("everybody of a name waits", "hostile", "before.set()", "pass"),
    M("paired: level", "studies", "(1 + level) / 2", "level"),
    M("paired: one-sided", "studies", "2 * float(stdtr(", "float(stdtr("),
    M("holm: not monotone", "studies", "largest = max(largest, min(1.0,", "largest = (min(1.0,"),
    M("differences: not by seed", "studies", "ours[seed] - theirs[seed]", "ours[seed] - min(theirs.values())"),
    M("paper: no escapes", "studies", 'return "".join(special.get(c, c) for c in text)', "return text"),
    M("sweep: own values are overwritten", "studies", "if name not in values}", "}"),
    M("sweep: entries without effect stay", "studies", "if name in kept}", "}"),
    M("sweep: seed of the draws", "studies", "chance = random.Random(seed)", "chance = random.Random(0)"),
    M("sweep: no logarithm", "studies", 'values["high"], values.get("log")', 'values["high"], False'),
    M("sweep: idle options pass", "studies", "if option not in used:", "if False:"),
    M("halving: the worse go on", "effort", "key=lambda n: -(scores[n] or 0.0)", "key=lambda n: (scores[n] or 0.0)"),
    M("trials see test rows", "effort", "return replace(source, test=source.validation, test_clients=source.validation_clients)", "return source"),
    M("each seed holds out other test rows", "effort", "first.test_seed is None and drawn[read]:", "False:"),
    M("a study's seed is tuned on", "effort", "if seed in config.seeds:", "if False:"),
    M("fewer trials for some", "effort", "if trials > sizes[entry]:", "if False:"),
    M("other values are believed", "effort", 'if kept["values"] != leg.point:', "if False:"),
    M("a trial does not pause", "effort", "index + 1 == t.rounds, index + 1 == self._until", "index + 1 == t.rounds, False"),
    M("trials stop early", "effort", '"stop_after": None, "keep_best": False', '"keep_best": False'),
    M("no brake", "hostile", "self._refusals[key] >= REFUSALS", "False"),
    M("remote rows unweighted", "worker", "weights = self.setup.task.weights(y) if labels else None", "weights = None"),
    M("remote tails count their rows", "worker", "loss.item(), client.mass)", "loss.item(), message.rows)"),
    # From tables to data sets
    # Text
    M("the last token of an answer is not learnt", "text", "a <= start < b for a, b in answers", "a <= start < b - 1 for a, b in answers"),
    M("a row's last token has no target", "text", "after = tokens.ids[start : start + length], slice(start + 1, start + 1 + length)", "after = tokens.ids[start : start + length], slice(start + 1, start + length)"),
    M("rows hold texts of two clients", "text", "groups.setdefault(document.owner, []).append(i)", "groups.setdefault(None, []).append(i)"),
    M("filled up on the wrong side", "text", "at = slice(length - len(row), None) if left else", "at = slice(length - len(row), None) if not left else"),
    M("the mask is that of the padding", "text", "= row, follow, 1", "= row, follow, 0"),
    # Adapters
    M("layers of another part are drawn anew", "recovery", 'reset := getattr(type(module), "reset_parameters", None)', 'reset := getattr(module, "reset_parameters", None) and (lambda own: own.reset_parameters())'),
    M("filling counts as text", "recovery", "return ~run", "return torch.ones_like(run)"),
    M("one ignored token at the end is filling", "recovery", "_SAME = 2", "_SAME = 1"),
    M("candidates as they would be sent", "recovery", 'self.smashed(few, "scale", bare=True).double()', 'self.smashed(few, "scale").double()'),
    M("the farthest of the first candidates", "recovery", "found, at = near.max(2)", "found, at = near.min(2)"),
    M("candidates without what was found before", "recovery", "ids = words.ids.repeat(len(candidates), 1)", "ids = torch.zeros_like(words.ids).repeat(len(candidates), 1)"),
    M("only the likeliest tokens are tried", "recovery", "if exact and distance >", "if False and distance >"),
    M("an encoder is searched like a decoder", "recovery", 'if attack == "search" and looks_ahead(seen)', "if False"),
    M("who knows the first weights knows the last", "recovery", "client, bare = self.begun, self.begun_bare", "pass"),
    M("the guesser knows the attacked text", "recovery", "commonest = seen.auxiliary.ids[seen.learnt].bincount().argmax()", "commonest = words.ids.max()"),
    M("adapters on the other side", "adapters", '(name in client) == (lora.sides == "client")', '(name in client) == (lora.sides == "server")'),
    M("an exported adapter keeps its own names", "adapters", "injected = not isinstance(model, peft.PeftModel)", "injected = False"),
    M("a base in bfloat16 becomes float32 again", "adapters", "if not isinstance(module, Halved):", "if True:"),
    M("no gradient passes a layer in bfloat16", "adapters", "return gradient @ weight.to(gradient.dtype), None, None", "return 0 * gradient @ weight.to(gradient.dtype), None, None"),
    M("an exported adapter of a smaller rank has another scale", "adapters", "{layer: scale * rank for layer, rank in own.items()}", "{layer: config.lora_alpha for layer, rank in own.items()}"),
    M("an exported adapter has rows of zeros", "adapters", "rank = int(used.max()) + 1 if len(used) else 1", "rank = len(state[first])"),
    M("the average of adapters of several ranks is that of their factors", "adapters", 'if self.about["model_options"].get("lora_ranks") else None', "if False else None"),
    M("stacked clients get adapters of the largest rank", "adapter ranks", "self._stack.load_one(k, narrowed(self._stack.state_of(k), rank))", "self._stack.load_one(k, self._stack.state_of(k))"),
    M("rounding chooses directions that no client has", "adapter ranks", "(sizes > _NOTHING * mean.norm())", "(sizes > -1.0)"),
    M("one client's model is tested for all ranks", "adapter ranks", "(self._at_work or self.setup.ranked)", "self._at_work"),
    M("filling hides that an encoder looks ahead", "recovery", "last = (there[longest] * places).amax(1)", "last = torch.full_like(longest, len(places) - 1)"),
    M("a plan forgets that a client's blocks keep less", "checkpointed plan", "return part.peak(config.batch, config.client_optimizer, checkpointed=checkpointed)", "return part.peak(config.batch, config.client_optimizer)"),
    M("a plan computes no block again", "checkpointed plan", "flops = _directly(parts, self.x) if again else flops", "flops = flops"),
    M("a tail is computed again on the server's side", "checkpointed plan", "after = (beyond or tail).flops.server", "after = tail.flops.server"),
    M("a cut is chosen as if nothing were computed again", "checkpointed plan", "checkpointed=at_client(self.config.gradient_checkpointing))", "checkpointed=False)"),
    M("a plan has clients of one rank", "adapter ranks", "shrink(own, {name: shape for name, shape in of_rank(own, rank).items() if name in owned})", "pass"),
    M("a plan's server has adapters of a client's rank", "adapter ranks", "if name in owned})", "})"),
    M("the time of a tail is that of the largest rank", "adapter ranks", "self._tails = np.array([f.tail.training for f in own])", "self._tails = np.array([flops.tail.training for f in own])"),
    M("another rank is told by a fingerprint", "adapter ranks", 'if field == "crossing":', "if False:"),
    M("columns beyond a rank stay after averaging", "adapter ranks", "own[second][:, rank:] = 0", "pass"),
    M("columns of stacked clients stay beyond a rank", "adapter ranks", "found[second][:, rank:] = 0", "pass"),
    M("a frozen factor of a smaller rank is trained", "adapter ranks", "requires_grad=getattr(owner, leaf).requires_grad", "requires_grad=True"),
    M("a layer of a smaller rank has its old size", "adapter ranks", "owner.out_features, owner.in_features = tensor.shape", "pass"),
    M("ranks are counted in the order of the clients", "adapter ranks", "order = sorted(set(ranks))", "order = list(dict.fromkeys(ranks))"),
    M("all clients of a plan have tails", "adapter ranks", "tail = self.tail if bent else None", "tail = self.tail"),
    M("a planned whole model computes with the largest rank", "adapter ranks", "flops=replace(m.flops, uncut=computed)", "flops=m.flops"),
    M("a planned client computes nothing in its tail", "adapter ranks", "computed = c.samples_per_client * m.flops.at_client.training", "computed = c.samples_per_client * m.flops.client.training"),
    M("the twin of the server has the smallest rank", "adapter ranks", "return max(numbers(p.clients.ranks)) if p.clients.ranks else p.deepest", "return p.deepest"),
    M("every client keeps a base of its own", "adapters", "if _place(tensor) not in copies:", "if True:"),
    M("an owner may lose all rows", "data", "pool = np.delete(np.argsort(order), first)", "pool = np.argsort(order)"),
    M("held out from the first owners", "data", "((np.arange(count) + drawn.random()) * len(pool) / count).astype(np.int64)", "np.arange(count)"),
    M("held out without regard to owners", "data", "pool = pool[np.lexsort(keys)]", "pass"),
    M("held out without regard to classes", "data", "(owners[rows[pool]],) if y is None else (y[rows[pool]], owners[rows[pool]])", "(owners[rows[pool]],)"),
    M("strangers are somebody", "data", "np.where(present[rank] == values, rank, -1)", "rank"),
    M("owners of held-out rows", "data", 'owners["train"][rows if part == "train" else held[part]]', 'owners["train"][np.sort(rows)[: len(samples(part).y)]]'),
    M("held-out rows set the scale", "data", "convert = Conversion.of(raw, rows)", 'convert = Conversion.of(raw, np.arange(len(y["train"])))'),
    M("a part that is given is held out again", "data", "if part in y: continue", "if False: continue"),
    # Schedules and optimisers
    M("the line ends at nothing", "training", "1.0 - (1.0 - self.lr_end) * progress", "1.0 - progress"),
    M("one cycle ends at nothing", "training", "_between(1.0, self.lr_last,", "_between(1.0, 0.0,"),
    M("a function of the round gets the progress", "training", "round(progress * self.rounds) if first in _COUNTING else progress", "progress"),
    M("the server does not warm up", "training", "WarmedUp(then=server, warmup=warmup, rounds=rounds)", "server"),
    M("groups decay alike", "training", 'made["weight_decay"] = group.weight_decay', "pass"),
    M("groups of an own optimiser at the base rate", "training", 'if "lr_factor" not in group and group["lr"] != self.lr:', "if False:"),
    M("only the last batch steps", "training", "p.grad = held if p.grad is None else p.grad.add_(held)", "pass"),
    M("stacked groups at the base rate", "training", "return group.lr, self.weight_decay", "return 1.0, self.weight_decay"),
    # Registered things and their options
    M("options out of bounds", "registry", "bounds: dict[str, Any] = dict(self.bounds)", "bounds: dict[str, Any] = {}"),
    M("options unchecked", "registry", "return dict(_form(self)(**values))", "return {**self.defaults, **values}"),
    M("options of others taken", "registry", 'extra="forbid", frozen=True', 'extra="ignore", frozen=True', "class Thing("),
    M("planned options forgotten", "registry", 'bool(extra.get("planned", False))', "False"),
    M("an engine that lacks a verb", "choice", "(lacking := sorted(needs - StackedCohort.can)):", "(lacking := sorted(needs - needs)):"),
    M("an algorithm that the stack lacks verbs for", "choice", "if lacking := sorted(self.traits.needs - StackedCohort.can):", "if lacking := sorted(StackedCohort.can - StackedCohort.can):"),
    # Clients on other machines
    M("labels of a U-shape go up", "client", "if message.labels and self.duty.traits.u_shaped:", "if False:"),
    M("rounds of any length", "client", "if quota is None or message.batches <= quota:", "if True:"),
    M("one more than the budget", "client", "if spent + count > limit:", "if spent + count > limit + 1:"),
    M("releases forgotten at a restart", "client", "most = self._before + int(", "most = int("),
    M("the same noise for other weights", "client", "[_digest(own)] for own in of", "['x'] for own in of"),
    M("a record that others read", "client", "os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600", "os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644"),
    M("invisible characters are shown", "client", "c if c.isprintable() else", "c if ord(c) > 31 else"),
    M("signals wait for the end of the round", "client", "if self.stop is not None and self.stop.is_set():", "if False:"),
    M("a budget that nobody approved", "client", '"budget": joining.budget.model_dump(),', ""),
    M("models despite noise", "client", "if protection.noisy and (traits.models_cross or traits.gradients_cross) and not budget.give_model_despite_noise:", "if False:"),
    M("the worker permits everything", "worker", "if served.verbs and not served.verbs & needs:", "if False:"),
    M("models leave the worker unasked", "worker", "m.GiveModel: _Served(Worker._give_model, frozenset({AVERAGE, HAND_OVER}))", "m.GiveModel: _Served(Worker._give_model)"),
    M("local training twice for a lost answer", "worker", "if self._fitted is None or not self._done(message.step):", "if True:", "def _learn(self, message: m.Learn"),
    M("a steering server shares gradients", "algorithms", 'self.model_copy(update={"phi": 0.0})', "self"),
    # Traffic as stated by algorithms
    M("nobody shares in the plan", "traffic", "sharing=self._active_of(epoch.clients)", "sharing=0"),
    M("SFL averages nothing in the plan", "traffic", "averaged=epoch.client_model", "averaged=0", "class Sfl("),
    M("the relay carries nothing in the plan", "traffic", "moved=epoch.client_model", "moved=0", "class Ssl("),
    # Pooling, a chain of layers, and steps by hand
    M("of equal neighbours in a row the second", "pooling", "_in_rows(x)[0], _in_rows(by_x), by_x)", "_in_rows(x)[1], _in_rows(by_x)[::-1], by_x)"),
    M("of equal rows the second", "pooling", "_in_columns(wide)[0], _in_columns(shared), shared)", "_in_columns(wide)[1], _in_columns(shared)[::-1], shared)"),
    M("the smaller one shares the gradient", "pooling", "torch.sub(g, to[0], out=to[1])", "to[1].copy_(g)"),
    M("the last of an odd row has a gradient", "pooling", "else torch.zeros_like(x)", "else torch.ones_like(x)"),
    M("the last of odd rows has a gradient", "pooling", "else torch.zeros_like(wide)", "else torch.ones_like(wide)"),
    M("pooling of odd sizes to the end as by two", "layout", "and are(1, dilation) and ceil is False", "and are(1, dilation)"),
    M("pooling by one as by two", "layout", "are(2, kernel, stride) and", "are(2, kernel) and"),
    M("pooling before a relu that others see", "layout", "and len(relu.users) == len(source.users) == 1", ""),
    M("layouts that differ are the same", "layout", "return close(list(zip(*results, strict=True)))", "return True"),
    M("activations without their gradients", "chain", "g = back(g, y)", "pass"),
    M("only the last activation's gradient", "chain", "zip(reversed(layer.maps), reversed(given[number]), strict=True)", "zip(layer.maps[-1:], given[number][-1:], strict=True)"),
    M("mean for sum in a chain's bias", "chain", "found.append(g.sum(1))", "found.append(g.mean(1))"),
    M("a chain's gradients in the order of layers", "chain", "*reversed(found))", "*found)"),
    M("the second activation in place of the first", "chain", "y if number == 0 else y.clone()", "y"),
    M("frozen layers in a chain", "chain", "if names and sorted(names) == sorted(trained) else None", "if names else None"),
    M("a chain in single precision", "chain", 'getattr(part, "narrow_to", None) is not None or', ""),
    M("several lines of a row in a chain", "chain", "return self.flattens or x.dim() == 2", "return True"),
    M("one line of a row, flattened, not in a chain", "chain", "return self.flattens or x.dim() == 2", "return x.dim() == 2"),
    M("rows in several lines in a chain", "chain", 'getattr(module, "start_dim", None) == 1 and getattr(module, "end_dim", None) == -1', "True"),
    M("momentum forgotten", "descent", 'momentum=d["momentum"], lr=lr', "momentum=0.0, lr=lr"),
    M("dampened from the first step on", "descent", "is_first_step=not taken", "is_first_step=False"),
    M("momentum without decay", "descent", "weight_decay=decay, momentum=", "weight_decay=0.0, momentum="),
    M("Adam without decay", "descent", "weight_decay=decay, eps=", "weight_decay=0.0, eps="),
    M("RMSprop without decay", "descent", "g = g.add(w, alpha=decay)", "pass"),
    M("the last clients get no block", "descent", "range(0, clients, few)", "range(0, clients - few + 1, few)"),
    M("the last factors alone in a block", "descent", "part.product_of(span, block, add=number > 0)", "part.product_of(span, block, add=False)"),
    M("factors alone in a block", "descent", "block += gradient[span]", "pass"),
    M("factors alone", "descent", "total += gradient", "pass"),
    M("the first factors alone", "descent", "total += part.product()", "pass"),
    M("products not as the weight lies", "descent", "laid_as(total.to(weight.dtype), weight)", "total.to(weight.dtype)"),
    M("gradients not as the weight lies", "descent", "self.step(weight, laid_as(gradient, weight), moments", "self.step(weight, gradient, moments"),
    M("one model's gradient not as the weight lies", "descent", "self._how.step(p.detach(), laid_as(p.grad, p), state", "self._how.step(p.detach(), p.grad, state"),
    M("one model's clock stands", "descent", 'state["step"] += 1', "pass"),
    M("one model's steps are all the first", "descent", "self._taken[p] = (state, taken + 1)", "self._taken[p] = (state, 0)"),
    M("a clock taken up again begins anew", "descent", 'int(state["step"]) if', "1 if"),
    M("tensors stay as they lie", "descent", "return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)", "return tensor"),
    M("a stack's moments stay as they lie", "checkpoint", "laid_as(t.to(self.device, copy=True), self._parameters[name])", "t.to(self.device, copy=True)"),
    # Forms of a convolution, and separate computation of each copy
    M("a neighbour's kernel on the way back", "convolutions", "zip(g.split(size), x.split(size), w.unbind(0), strict=True)", "zip(g.split(size), x.split(size), w.roll(1, 0).unbind(0), strict=True)"),
    M("padding in words in all forms", "convolutions", 'if x.device.type != "cpu" or isinstance(padding, str):', 'if x.device.type != "cpu":'),
    M("rows of clients in turn", "convolutions", "return y.transpose(0, 1).reshape(len(x), *y.shape[2:])", "return y.reshape(len(x), *y.shape[2:])"),
    M("each by itself with the first one's weights", "stack", "copies[i] for n, copies in own.items()", "copies[0] for n, copies in own.items()"),
    M("each by itself without a stream", "stack", "draw_from(generators(name))", "pass"),
    M("each by itself unproven", "choice", 'obstacle("lowered"), obstacle("each")', 'obstacle("lowered"), ""'),
    # Tuning: measured, stored and chosen ways
    M("ways of a run that goes on are chosen anew", "choice", "if stored is not None and self._proven(stored, engine):", "if False:"),
    M("kept ways unproven", "choice", "(known := recalled(name)) is not None and self._proven(known, engine)", "(known := recalled(name)) is not None"),
    M("a way a little quicker is taken", "tuning", "best.seconds < MARGIN * timed[0].seconds", "best.seconds < timed[0].seconds"),
    M("a layout a little quicker is taken", "tuning", "pair[0] < MARGIN * usual", "pair[0] < usual"),
    M("the slowest way", "tuning", "best = min(timed, key=lambda one: one.seconds)", "best = max(timed, key=lambda one: one.seconds)"),
    M("the slowest form", "tuning", "best = min(times, key=times.__getitem__)", "best = max(times, key=times.__getitem__)"),
    M("a form a little quicker is taken", "tuning", "times[best] < MARGIN * times[otherwise]", "times[best] < times[otherwise]"),
    M("layouts unproven", "tuning", "next((ways for ways in found if self._laid_out(ways)), ruled)", "next(iter(found), ruled)"),
    M("measured on another machine", "remembered", "json.dumps({**machine, **subject}, sort_keys=True)", "json.dumps({**subject}, sort_keys=True)"),
    M("measured on rows of other shapes", "remembered", "[(list(r.shape[1:]), str(r.dtype)) for rows in self._rows.values() for r in rows]", "[]"),
    M("measured with other options", "remembered", "[c.engine, c.algorithm, c.device, c.precision, c.start, c.batch, c.memory_limit]", "[]"),
    M("short runs are measured", "tuning", "if self.work.rows < _FEWEST:", "if False:"),
    M("short runs are measured for long", "tuning", "min(_HALF, _OF_SHORT * run)", "_HALF"),
    M("long runs are measured for ever", "tuning", "min(_LONGEST, _OF_LONG * run)", "_OF_LONG * run"),
    M("measured although it is late", "tuning", "if self.late: return float", "if False: return float"),
    M("how copies are computed is not stored", "ways", "return asdict(self)", 'return {**asdict(self), "copies": asdict(Stacking())}'),
    # Building cohorts for what was chosen
    M("a penalty that clients' own losses lack", "simulation", "if protection.penalised and LEARN in algorithm.traits.needs:", "if False:"),
    M("a penalty where nothing is trained", "simulation", "if protection.penalised and not trains(chosen.split.client):", "if False:"),
    M("simulated clients are undefended", "simulation", "if protection.active: cohort", "if False: cohort"),
    M("algorithms take verbs unasked", "simulation", "return BoundedCohort(cohort, config.algorithm, algorithm.traits.needs), server", "return cohort, server"),
    # Operations that draw random numbers
    M("layers within layers draw nothing", "trace", "any(map(_layer_may_draw, part.get_submodule(str(node.target)).modules()))", "_layer_may_draw(part.get_submodule(str(node.target)))"),
    M("hooks draw nothing", "trace", "return hooked or not kind.", "return not kind."),
    M("what says nothing draws nothing", "seeds", 'getattr(module, "draws", True) else contextlib', 'getattr(module, "draws", False) else contextlib'),
    M("nothing is seeded", "seeds", 'if getattr(module, "draws", True) else contextlib.nullcontext()', "if False else contextlib.nullcontext()"),
    M("streams stay", "seeds", "kind.set_rng_state(before)", "pass"),
    # Copies of modules
    M("copies share dictionaries", "copies", "made = memo[id(thing)] = type(thing)()", "made = memo[id(thing)] = thing"),
    M("shared modules are copied twice", "copies", "memo[id(module)] = made", "pass"),
    M("a state dict loses what is beside its items", "copies", "if type(thing) is OrderedDict and thing.__dict__:", "if False:"),
    M("modules that copy themselves are not asked", "copies", 'and "__deepcopy__" not in thing.__dict__', ""),
    M("modules are left to the slow way", "copies", "if type(state) is dict:", "if False:"),
    M("a module's state is taken past it", "copies", "made.__setstate__({", "made.__dict__.update({"),
    # The paper's tables with another model
    M("another model in some tables alone", "another model", "replace(self.size, model=model, methods_model=model)", "replace(self.size, model=model)"),
    M("another model without its options", "another model", 'config.options_of(find("model", config.model))', "{}"),
    M("another model counted where the zoo's is cut", "another model", "chosen.given, **chosen.things", "chosen.given"),
    M("a failed reproduction with another model", "another model", "if self.another_model and word in _DECIDED", "if False and word in _DECIDED"),
    M("any task's metric", "another model", 'judged.primary == "accuracy" and', "True or"),
    M("a model that cannot be measured is trained", "another model", "trained_work(self.study)", "pass"),
    M("nothing trained is an error", "another model", "if planned and not done:", "if not done:"),
    # Admission of clients
    M("denied clients are let in", "admission", 'raise StrangerError("excluded", why)', "return"),
    M("denied clients stay connected", "admission", "if link.open and (why := self._gate.denied.why(link.caller)):", "if not link.open and (why := self._gate.denied.why(link.caller)):"),
    M("serial numbers are no reason", "admission", "caller.sha256 in self.sha256 or caller.serial in self.serials", "caller.sha256 in self.sha256"),
    M("leading zeros of a serial number stay", "admission", 'return kind, digits.lstrip("0")', "return kind, digits"),
    M("a damaged file empties the list", "admission", 'self.news.append(("kept",', 'self.value = type(self.value)(); self.news.append(("kept",'),
    M("a change is seen once too often", "admission", "if state != self._seen:", "if state != self._seen or self.news:"),
    M("new certificates are not given out", "admission", "return found.configuration", "return None"),
    M("old tokens stay good", "admission", "not in self._tokens.look()", "not in self._tokens.value"),
    M("who is denied is still needed", "admission", "return self.denied | self.excluded.keys()", "return frozenset(self.excluded)"),
    M("one host fills the record", "admission", "self._refusals.total() >= ALL or self._refusals[caller.host] >= EACH", "self._refusals.total() >= ALL"),
    M("windows stay short", "admission", "FIRST if quiet else min(2 * self._window, LONGEST)", "FIRST"),
    # Proofs that also hold for other models
    M("hooks are not seen", "likeness", "elif not (isinstance(value, dict | set) and not value)", "elif not isinstance(value, dict | set)"),
    M("any class is known", "likeness", 'if not f"{kind.__module__}.".startswith(_KNOWN):', "if False:"),
    M("tied weights are like others", "likeness", "yield name, firsts.setdefault(id(p), name), of_tensor(p)", "yield name, name, of_tensor(p)"),
    M("a mould keeps values", "mould", "for part in parts.all for name", "for part in parts.all[1:] for name"),
    M("constants are looked for in the model", "mould", "if name in known}", "}"),
    M("the values are the first model's", "mould", "deep_copy(state[name])", "state[name]"),
    M("tails come out without values", "mould", "tail=tail[0] if tail else None", "tail=parts.tail"),
    M("cuts at other places are alike", "likeness", "taken = (names, x.names,", "taken = (x.names,"),
    M("recomputing parts are alike", "recomputed", "replace(depth.parts, likeness=None)", "depth.parts"),
    M("gscala samples as scala", "gscala", 'presets={"logit_adjust": "both", "sampling": "global"}', 'presets={"logit_adjust": "both"}'),
    # Values from files, exit codes, and terms
    M("a folder in use is a person's fault", "stored", """Another process works in that folder. It may be an earlier process of this run that is about to end.\"\"\"

    code = ExitCode.TRY_AGAIN""", """Another process works in that folder. It may be an earlier process of this run that is about to end.\"\"\"

    code = ExitCode.WRONG"""),
    M("owners' equal scores are hidden", "printed", "if own or len(set(scores.values())) > 1", "if len(set(scores.values())) > 1"),
    M("no yardstick is printed", "printed", "if name != task.leading and not isinstance(scores[name], list | tuple):", "if False:"),
    M("parameters by position are no hint", "printed", "p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)", "False)"),
    M("filling in is not told", "data", "if gaps and impute is not None:", "if False:"),
    M("rows of pairs are the first client's", "data", "np.repeat(np.array(list(pairs)), [len(a) for a in x])", "np.repeat(np.array(list(pairs))[:1], sum(map(len, x)))"),
    M("one damaged handshake convicts", "certificates", "found is None or self._diagnosis(address) == found else None", "True else None"),
    M("complex sums are taken for real ones", "complex", "math.isfinite(as_real(t.detach()).sum())", "math.isfinite(t.detach().sum())"),
    M("complex weights are counters", "complex", "if not is_continuous(rows): return rows.amax(0)", "if not rows.is_floating_point(): return rows.amax(0)"),
    M("complex moments are squared", "complex", "if w.is_complex():", "if False:"),
    M("complex weights are fused", "complex", "if self.fused and not any(p.is_complex() for p in group[\"params\"]):", "if self.fused:"),
    M("complex NaN is taken from a file", "complex", "tensor.is_floating_point() or tensor.is_complex()) or bool(", "tensor.is_floating_point()) or bool("),
    M("NaN is taken from a file", "stored", "if not all_finite(given) and all_finite(like):", "if False:"),
    M("any shape is taken from a file", "stored", "if (given.shape, given.dtype) != (like.shape, like.dtype):", "if given.dtype != like.dtype:"),
    M("clocks of too few clients are taken", "stored", "if len(values) != count:", "if len(values) > count:"),
    M("records may be longer in the checkpoint than on the disk", "stored", "if name not in _RECORDS or length > sizes.get(name, 0):", "if name not in _RECORDS:"),
    M("a half line stays", "stored", "_cut(file, before)\n        raise", "raise", after="def append_whole("),
    M("names that follow from each other are the same", "stored", "hashlib.sha256(json.dumps(list(names)).encode())", "hashlib.sha256(', '.join(names).encode(errors='replace'))"),
    M("serve goes on with anything", "stored", "if was != now and name not in moved:", "if was != now and name == 'algorithm':"),
    M("gas keeps clients that bring nothing", "pace", "if k in smashed.clients or k not in arrived", "if k not in arrived"),
    M("gas waits for those who do not come", "pace", "crowd = working if arrived else len(queue) + 1", "crowd = working"),
    M("gas fills up to the rows that came", "pace", "(each - counts[known]).clamp(min=0)", "(counts.max() - counts[known]).clamp(min=0)"),
    M("gas draws before every label was seen", "pace", 'self.generate == "complete" and len(known)', 'self.generate == "never" and len(known)'),
    M("gas forgets how the means were apart", "pace", "s * (1 - s) * apart.square()", "s * (1 - s) * apart"),
    M("batches are as old as the last step", "pace", 'self._count("batches", client, self.steps - since)', 'self._count("batches", client, self.steps)'),
    M("models age at their owners' averagings", "pace", 'self._of("since averaging")[client] = self._kept["ages clock"][1]', 'self._of("since averaging")[client] = 0'),
    M("late clients are waited for", "pace", "self._came.get(timeout=seconds)", "self._came.get(timeout=None if seconds is None else 90 + seconds)"),
    M("all that works is averaged", "pace", "self._at_work -= set(averaged)\n        self._has_average", "self._at_work.clear()\n        self._has_average"),
    M("who is at work gets the average after a restart", "pace", "sorted((self._stale | away) - at_work.keys())", "sorted(self._stale | away)"),
    M("variances may be infinite", "pace", "2 * largest([r]) < math.sqrt(", "2 * largest([r]) < ("),
    M("blocks keep what was averaged for them", "cuts", "            beside.take(one)\n", ""),
    M("blocks are counted where nobody computes them", "cuts", "+ float(rows @ self._between))", ")"),
    M("clients that train nothing get gradients", "cuts", "if self.blocks.trains(part.clients[0]) else ()", "if part.clients else ()"),
    M("the shallowest cut that fits is chosen", "cuts", "return fit[-1].name", "return fit[0].name"),
    M("all clients get one client's models counted", "cuts", "self._cuts[k] if self._cuts else 0, []", "0, []"),
    M("blocks forget how far they drew", "cuts", "block.passed = kept.passed", "pass"),
    M("far clients get the whole average", "cuts", "own = {n: cropped(self._average[n], like.shape).contiguous() for n, like in self._like(k).items()}", "own = dict(self._average)"),
    M("blocks are planned where nobody computes them", "cuts", "own + (w.flops.server.training - server.training)", "own"),
    M("one planned model for all cuts", "cuts", "(1 if self.fleet.multicast else w.clients)", "(1 if self.fleet.multicast and w is self.w else w.clients)"),
    M("who averages nothing is never late", "cuts", "(epochs - 1) * max(later, 0.0)", "0.0"),
    M("all planned cuts share gradients", "cuts", "deepest = mix.clients if mix.ranked else self.work.clients", "deepest = mix.clients"),
    M("no draw without a deepest cut", "cuts", "math.exp(orders[0] - orders[1])", "0.0"),
    M("the server's memory without blocks", "cuts", "for one in (server, *blocks)", "for one in (server,)"),
    M("frozen blocks are held for each cut", "cuts", "max(one.frozen for one in blocks)", "sum(one.frozen for one in blocks)"),
    M("planned blocks have one client's rows", "cuts", "last.client - m.client, n * c.batch, c, n)", "last.client - m.client, c.batch, c, n)"),
    M("the first cut is planned as the deepest", "cuts", "_counted(model, x, inner).order[-1]", "inner[0]"),
    M("blocks bear everything", "cuts", "return finite(*(t for t in found if t.is_floating_point()))", "return True"),
]  # fmt: skip


class UnusableError(Exception):
    """A mutant that cannot be applied to the code as it is."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[m.name for m in MUTANTS], help="these mutants")
    parser.add_argument("--area", nargs="+", metavar="AREA", choices=list(AREAS), help=f"of {', '.join(AREAS)}")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="results as JSON lines; what is there is not run again"
    )
    parser.add_argument("--hints", type=Path, metavar="FILE", help="results of an earlier run, as --out writes them")
    parser.add_argument("--check", action="store_true", help="run no tests")
    options = parser.parse_args()
    chosen = [
        m
        for m in MUTANTS
        if (not options.only or m.name in options.only) and (not options.area or m.area in options.area)
    ]
    if options.check:
        wrong = [(m, fault) for m in chosen if (fault := fault_of(m))]
        for mutant, fault in wrong:
            say(f"{mutant.name}: {fault}")
        say(f"{len(chosen) - len(wrong)} of {len(chosen)} mutants can be applied")
        return bool(wrong)
    results = earlier(options.out)
    areas = {m.area for m in chosen}
    passed = set(results.get("", {}).get("areas", []))
    if new := areas - passed:
        say(f"without a mutant: {', '.join(sorted(new))}")
        unchanged = run_tests(None, [f for area in AREAS if area in new for f in tests_of(area)])
        if unchanged["outcome"] != "survived":
            say(f"the tests fail without any mutant: {unchanged['by']}")
            return 2
        keep(options.out, results, {"name": "", "areas": sorted(passed | new), **unchanged})
    left = [m for m in chosen if results.get(m.name, {}).get("outcome") not in ("killed", "survived")]
    hints = {name: result["by"] for name, result in earlier(options.hints).items() if result["outcome"] == "killed"}
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(judge, m, hints.get(m.name)) for m in left]):
            result = done.result()
            keep(options.out, results, result)
            say(f"{result['outcome']:9} {result['seconds']:6.1f} s  {result['area']}: {result['name']}  {result['by']}")
    return summary([results[m.name] for m in chosen])


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def earlier(out: Path | None) -> dict[str, dict[str, Any]]:
    """The results in `out`, by name. Those without a mutant have an empty name."""
    if out is None or not out.exists():
        return {}
    return {result["name"]: result for result in map(json.loads, out.read_text().splitlines())}


def keep(out: Path | None, results: dict[str, dict[str, Any]], result: dict[str, Any]) -> None:
    results[result["name"]] = result
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(result) + "\n")


def summary(results: Sequence[dict[str, Any]]) -> int:
    """Prints a summary. Returns the exit code, which is 0 if all mutants were killed."""
    of = {outcome: [r for r in results if r["outcome"] == outcome] for outcome in ("killed", "survived", "unusable")}
    for outcome in ("survived", "unusable"):
        for result in of[outcome]:
            say(f"{outcome}: {result['area']}: {result['name']}  {result['by']}")
    seconds = sum(r["seconds"] for r in results)
    usable = len(of["killed"]) + len(of["survived"])
    say(f"killed {len(of['killed'])} of {usable}, {len(of['unusable'])} unusable, {seconds / 60:.0f} minutes")
    return 0 if len(of["killed"]) == len(results) else 1


def judge(mutant: Mutant, hint: str | None) -> dict[str, Any]:
    """Runs the tests of the mutant's area, beginning with the test that `hint` names."""
    found = {"outcome": "unusable", "seconds": 0.0, "by": fault_of(mutant)}
    if not found["by"]:
        found = run_tests(mutant, [hint]) if hint else found
        if found["outcome"] != "killed":
            found = run_tests(mutant, tests_of(mutant.area))
    return {"name": mutant.name, "area": mutant.area, **found}


def fault_of(mutant: Mutant) -> str:
    """Why a mutant cannot be applied, or empty if it can."""
    try:
        path, text = mutated(mutant, PACKAGE)
        compile(text, path, "exec")
    except UnusableError as error:
        return str(error)
    except SyntaxError as error:
        return f"does not compile ({error.msg}): rewrite this mutant"
    return ""


def mutated(mutant: Mutant, package: Path) -> tuple[Path, str]:
    """The file that a mutant changes, and its changed text. Raises UnusableError."""
    texts = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    once = pattern(mutant.after or mutant.snippet)
    found = [(path, match) for path, text in texts.items() for match in once.finditer(text)]
    if len(found) != 1:
        raise UnusableError(f"{f'found {len(found)} times' if found else 'not found'}: rewrite this mutant")
    ((path, match),) = found
    text = texts[path]
    if mutant.after:
        behind = pattern(mutant.snippet).search(text, match.end())
        if behind is None:
            raise UnusableError(f"not found behind {mutant.after!r}: rewrite this mutant")
        match = behind
    return path, text[: match.start()] + mutant.replacement + text[match.end() :]


def pattern(snippet: str) -> re.Pattern[str]:
    """A pattern that finds a snippet with any line breaks and indentation."""
    tokens = re.findall(r"\w+|[^\w\s]", snippet)
    whole = r"(?<!\w)" if is_word(tokens[0]) else ""
    for token, behind in zip(tokens, [*tokens[1:], ""], strict=True):
        apart = is_word(token) and is_word(behind)
        whole += re.escape(token) + (r"\s+" if apart else r"\s*" if behind else "")
    return re.compile(whole + (r"(?!\w)" if is_word(tokens[-1]) else ""))


def is_word(token: str) -> bool:
    return re.match(r"\w", token) is not None


def tests_of(area: str) -> list[Path]:
    """The test files of an area, in order."""
    files = [f for f in sorted(TESTS.rglob("test_*.py")) if not any(fnmatch.fnmatch(f.name, p) for p in LEFT_OUT)]
    named = [TESTS / p for p in AREAS[area] if "*" not in p]
    fitting = (f for p in AREAS[area] for f in [*files, *named] if fnmatch.fnmatch(f.relative_to(TESTS).as_posix(), p))
    found = list(dict.fromkeys(fitting))
    if not found:
        raise SystemExit(f"no test file fits the patterns of {area!r}: correct AREAS")
    return found


def run_tests(mutant: Mutant | None, files: Sequence[Path | str], limit: float = 1200.0) -> dict[str, Any]:
    """Runs test files or single tests on a copy of the code with `mutant`.

    Returns the outcome, the seconds, and the test that failed.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder, "src")
        shutil.copytree(PACKAGE, copy / "cutlayer")
        shutil.copytree(
            ROOT / "docs", Path(folder, "docs"), ignore=shutil.ignore_patterns("*.png")
        )  # next to src, as in the repository
        if mutant is not None:
            path, text = mutated(mutant, copy / "cutlayer")
            path.write_text(text)
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(folder, "hypothesis")),
        }
        command = [
            *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", "120", "-k", KEYWORDS),
            *("-o", f"pythonpath={' '.join([str(copy), *import_folders()])}", "--hypothesis-seed", "0"),
            *("--basetemp", str(Path(folder, "tmp"))),
            *map(str, dict.fromkeys(files)),
        ]
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
            by = next(failures(output), "")
            outcome = {0: "survived", 1: "killed"}.get(process.returncode, "unusable")
            if outcome == "unusable":
                by = by or f"pytest ended with {process.returncode}: {output.strip().splitlines()[-1:]}"
        except subprocess.TimeoutExpired:
            outcome, by = "killed", f"no end within {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"outcome": outcome, "seconds": round(time.monotonic() - started, 1), "by": by}


def import_folders() -> list[str]:
    """The folders of imports in tests, as in pytest's configuration."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    folders: list[str] = settings["pythonpath"]
    return folders


def failures(output: str) -> Iterator[str]:
    """The tests that failed."""
    for line in output.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            yield line.split(" ", 1)[1].split(" - ")[0]


if __name__ == "__main__":
    sys.exit(main())
