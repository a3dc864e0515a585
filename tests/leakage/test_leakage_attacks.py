"""Attacks on small examples: passive reconstruction, label leakage, hijacking, and the client's watch."""

import functools
import json
from dataclasses import asdict

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from cutlayer import Samples
from cutlayer.defences.watch import Watch
from cutlayer.errors import ConfigError, DataError
from cutlayer.leakage.fitting import Budget
from cutlayer.leakage.hijack import Hijack
from cutlayer.leakage.ranks import label_leakage
from cutlayer.leakage.reconstruct import reconstruct, ssim

BUDGET = Budget(steps=480, batch=64, lr=2e-3, check_every=60, patience=4)


@functools.cache
def digits() -> tuple[Samples, Samples]:
    """The attacker's 900 digits and the clients' 897, shuffled: pictures [n, 1, 8, 8] in [0, 1]."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(1))
    samples = Samples(torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target))[order]
    return samples[:900], samples[900:]


@functools.cache
def shallow() -> tuple[nn.Module, nn.Module]:
    """A client part of one convolution and a server part, trained on the clients' digits."""
    _, own = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        client = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        server = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam([*client.parameters(), *server.parameters()], 2e-3)
        for _ in range(150):
            rows = torch.randint(len(own), (64,))
            optimizer.zero_grad()
            functional.cross_entropy(server(client(own.x[rows])), own.y[rows]).backward()
            optimizer.step()
    return client.eval().requires_grad_(False), server.eval()


def noisy(sigma: float):
    """A function that adds Gaussian noise to smashed data."""
    return lambda rows: rows + sigma * torch.randn_like(rows)


# --- reconstruction ----------------------------------------------------------------------------------------------


def test_an_undefended_shallow_cut_is_reconstructed():
    auxiliary, own = digits()
    client, _ = shallow()
    found = reconstruct(own.x, client(own.x), own.y, auxiliary, client=client, budget=BUDGET)
    report = found.report
    assert report.attack.mse < report.nearest.mse / 2 < report.mean_input.mse / 2
    assert report.attack.psnr > report.nearest.psnr + 3
    assert report.attack.ssim > 0.9 > report.mean_input.ssim
    assert report.explained > 0.85
    assert report.true_accuracy > 0.9
    assert report.attack.accuracy > 0.85 > 0.2 > report.mean_input.accuracy
    assert found.inputs.shape == found.reconstructions.shape == (64, 1, 8, 8)
    error = float((found.inputs - found.reconstructions).square().mean())
    assert error == pytest.approx(report.attack.mse, rel=0.3)
    assert json.loads(json.dumps(asdict(report)))["knowledge"] == "model"


def test_overwhelming_noise_leaves_the_mean_picture():
    auxiliary, own = digits()
    client, _ = shallow()

    def defended(x):
        return noisy(30.0)(client(x))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = defended(own.x)
    report = reconstruct(own.x, z, own.y, auxiliary, client=defended, budget=BUDGET).report
    assert abs(report.explained) < 0.05
    assert report.nearest.mse > report.mean_input.mse  # the nearest neighbour is random
    assert report.attack.accuracy < 0.25


def test_without_the_client_part_a_surrogate_still_reconstructs():
    auxiliary, own = digits()
    client, server = shallow()
    report = reconstruct(
        own.x, client(own.x), own.y, auxiliary, server=server, knowledge="smashed", budget=BUDGET
    ).report
    assert report.explained > 0.4
    assert report.attack.mse < report.mean_input.mse / 2


def test_vectors_are_reconstructed_by_a_perceptron():
    auxiliary, own = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        client = nn.Linear(64, 48).requires_grad_(False)
    x = own.x.flatten(1)
    report = reconstruct(
        x, client(x), own.y, Samples(auxiliary.x.flatten(1), auxiliary.y), client=client, budget=BUDGET
    ).report
    assert report.attack.ssim is None
    assert report.attack.mse < report.nearest.mse


def test_an_attack_is_repeatable():
    auxiliary, own = digits()
    client, _ = shallow()
    few = Budget(steps=20, batch=32, check_every=10)

    def attack(seed):
        return reconstruct(own.x, client(own.x), own.y, auxiliary, client=client, seed=seed, budget=few).report

    assert attack(0) == attack(0) != attack(1)


def test_structural_similarity():
    _, own = digits()
    assert ssim(own.x[:20], own.x[:20], 1.0) == pytest.approx(1)
    assert ssim(own.x[:20], 1 - own.x[:20], 1.0) < 0
    assert ssim(own.x[:20, :, :2, :2], own.x[:20, :, :2, :2], 1.0) is None


# --- label leakage -----------------------------------------------------------------------------------------------


def test_rare_labels_show_in_the_norm_of_cut_gradients():
    """Two classes, 5% positive: after training, gradients of positives are larger (Li et al., section 3.1)."""
    draw = torch.Generator().manual_seed(0)
    y = (torch.rand(2000, generator=draw) < 0.05).long()
    x = torch.randn(2000, 10, generator=draw) + 0.5 * y[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        client, server = nn.Linear(10, 8), nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*client.parameters(), *server.parameters()], 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        functional.cross_entropy(server(client(x)), y).backward()
        optimizer.step()
    z = client(x).detach().requires_grad_()
    functional.cross_entropy(server(z), y, reduction="sum").backward()
    found = label_leakage(z.grad, y)
    assert found.norm_auc > 0.95
    assert found.cosine_auc > 0.95
    assert found.cluster_accuracy > found.majority > 0.9
    nothing = label_leakage(torch.randn(z.shape, generator=draw), y)
    assert nothing.norm_auc < 0.65
    assert 0.3 < nothing.cosine_auc < 0.7


# --- hijacking ---------------------------------------------------------------------------------------------------


@functools.cache
def hijacked_and_honest() -> tuple[Hijack, nn.Module, Watch, Watch]:
    """Clients after 400 steps under a hijacking and an honest server, with equal starts, and their watches."""
    auxiliary, own = digits()
    attacker, watches = Hijack(auxiliary, (8, 4, 4), ahead=0, critic_steps=1), (Watch(), Watch())
    clients = []
    with torch.random.fork_rng():
        for honest, watch in zip((False, True), watches, strict=True):
            torch.manual_seed(0)
            client = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, padding=1)
            )
            server = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
            optimizer = torch.optim.Adam([*client.parameters(), *server.parameters()], 1e-3)
            for _ in range(400):
                rows = torch.randint(len(own), (32,))
                z = client(own.x[rows])
                z.retain_grad()
                optimizer.zero_grad()
                if honest:
                    functional.cross_entropy(server(z), own.y[rows]).backward()
                else:
                    z.backward(attacker.gradients(z, own.y[rows]))
                watch.observe(z.grad, z, own.y[rows])
                optimizer.step()
            clients.append(client.requires_grad_(False))
    return attacker, clients[0], *watches


@pytest.mark.long
def test_a_hijacking_server_reads_the_clients_inputs():
    auxiliary, own = digits()
    attacker, client, _, _ = hijacked_and_honest()
    guess = attacker.reconstruct(client(own.x))
    assert guess.shape == own.x.shape
    mean_picture = (auxiliary.x.mean(0) - own.x).square().mean()
    assert (guess - own.x).square().mean() < 0.8 * mean_picture


def test_the_watch_tells_a_hijacker_from_an_honest_server():
    _, _, hijacked, honest = hijacked_and_honest()
    assert hijacked.suspicious
    assert not honest.suspicious
    assert hijacked.score < 0.7 < 0.9 < honest.score


@pytest.mark.parametrize(
    ("ask", "error", "sentence"),
    [
        (lambda a, x: reconstruct(x.x, x.x, x.y, a[:99], client=nn.Identity()), DataError, "99 samples are too few"),
        (lambda a, x: reconstruct(x.x, x.x[:5], x.y, a, client=nn.Identity()), DataError, "rows do not match"),
        (lambda a, x: reconstruct(x.x, x.x, x.y, a), ConfigError, "give client=..., or 'smashed'"),
        (lambda a, x: reconstruct(x.x, x.x, x.y, a, knowledge="models"), ConfigError, "did you mean 'model'"),
        (
            lambda a, x: reconstruct(x.x, x.x, x.y, Samples(a.x[:, :, 1:], a.y), client=nn.Identity()),
            DataError,
            r"auxiliary inputs have shape \(1, 7, 8\)",
        ),
        (lambda a, x: reconstruct(x.y, x.x, x.y, a, client=nn.Identity()), DataError, "takes real numbers"),
        (lambda a, x: label_leakage(x.x, torch.zeros_like(x.y)), DataError, "at least two classes"),
        (lambda a, x: Hijack(a[:10], (4,)), DataError, "10 samples are too few"),
        (lambda a, x: Hijack(a, (4,), ahead=0).gradients(torch.ones(3, 5), x.y[:3]), DataError, r"shape \(5,\)"),
    ],
)
def test_bad_input_gets_one_sentence(ask, error, sentence):
    with pytest.raises(error, match=sentence):
        ask(*digits())
