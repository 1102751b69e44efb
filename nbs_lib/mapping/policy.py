"""The policy of the search (mapping 5.1): layers in a row -> (regularity, block size) for each, and how it learns.

A sequence-to-sequence model reads the states with an RNN and decides with an LSTM, one layer a step; REINFORCE follows
Eq. 6. `N` layers, `R` regularities, `B` block sizes, `K` samples."""

import numpy as np
import torch
from torch import nn


def states(layers) -> np.ndarray:
    """The paper's 4-D states of LayerSpecs, float32 (N, 6): layer type (one of three), then log2 of kernel size, input
    and output channels."""
    kinds = [[float(layer.kind == kind) for kind in ("conv", "depthwise", "linear")] for layer in layers]
    sizes = [[(layer.Kh * layer.Kw) ** 0.5, layer.Q * layer.groups, layer.P] for layer in layers]
    return np.hstack([kinds, np.log2(sizes)]).astype(np.float32)


class Policy(nn.Module):
    """pi(M | I; theta). states: float (N, F); legal: bool (N, R, B), at least one per layer: all else is never drawn.

    It begins as uniform over each layer's legal pairs. Two things are ours: a share `floor` of every probability stays
    uniform, so that the search never stops finding mappings it has not seen, and a vector learnt for each place in the
    network is added to what the encoder says, as networks have many layers of equal states."""

    def __init__(self, states: np.ndarray, legal: np.ndarray, hidden: int = 64, floor: float = 0.05, seed: int = 0):
        super().__init__()
        if legal.ndim != 3 or len(states) != len(legal) or not legal.any(axis=(1, 2)).all():
            raise ValueError(f"Expected a legal (regularity, block) for each of {len(states)} layers. Got {legal}.")
        scale = np.abs(states).max(axis=0)
        self.register_buffer("states", torch.as_tensor(states / np.where(scale > 0, scale, 1), dtype=torch.float32))
        self.register_buffer("legal", torch.as_tensor(legal, dtype=torch.float32))
        self.floor, (_, regularities, blocks) = floor, legal.shape
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.RNN(states.shape[1], hidden, batch_first=True)
            self.decoder = nn.LSTMCell(2 * hidden, hidden)
            self.regularity, self.block = nn.Linear(hidden, regularities), nn.Linear(2 * hidden, blocks)
            self.place = nn.Embedding(len(states), hidden)
            self.taken = nn.ModuleList([nn.Embedding(regularities, hidden), nn.Embedding(blocks, hidden)])
        for head in (self.regularity, self.block):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, actions=None, samples: int = 1, generator: torch.Generator | None = None):
        """Actions, int64 (K, N, 2): `samples` drawn ones, or those given; and log pi of each, float32 (K,)."""
        count = samples if actions is None else len(actions)
        read, last = self.encoder(self.states[None])
        state, cell = last[0].expand(count, -1), torch.zeros(count, last.shape[-1])
        before, log, taken = torch.zeros_like(cell), torch.zeros(count), []
        for step, legal in enumerate(self.legal):
            here = (read[0, step] + self.place.weight[step]).expand(count, -1)
            state, cell = self.decoder(torch.cat([here, before], 1), (state, cell))
            given = (None, None) if actions is None else actions[:, step].unbind(1)
            first, log_first = self._choose(self.regularity(state), legal.sum(1).expand(count, -1), given[0], generator)
            both = torch.cat([state, self.taken[0](first)], 1)
            second, log_second = self._choose(self.block(both), legal[first], given[1], generator)
            log, before = log + log_first + log_second, self.taken[0](first) + self.taken[1](second)
            taken.append(torch.stack([first, second], 1))
        return torch.stack(taken, 1), log

    def _choose(self, logits: torch.Tensor, counts: torch.Tensor, given, generator):
        """Draw one of (K, C), or take what is given; and its log-probability (K,). counts: legal pairs behind each."""
        even = counts / counts.sum(1, keepdim=True)
        shares = (1 - self.floor) * torch.softmax(logits + even.log(), 1) + self.floor * even
        chosen = torch.multinomial(shares.detach(), 1, generator=generator)[:, 0] if given is None else given
        return chosen, shares.gather(1, chosen[:, None])[:, 0].log()


class Reinforce:
    """Draws K mappings and learns from their rewards by Eq. 6; the baseline B is a moving average of the rewards."""

    def __init__(self, states: np.ndarray, legal: np.ndarray, seed: int = 0, lr: float = 0.005, decay: float = 0.8):
        self.policy, self.decay, self.baseline = Policy(states, legal, seed=seed), decay, None
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr)
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, count: int) -> np.ndarray:
        """int (K, N, 2): regularity and block of every layer."""
        with torch.no_grad():
            return self.policy(samples=count, generator=self.generator)[0].numpy()

    @torch.enable_grad()  # a notebook may have turned gradients off
    def learn(self, actions: np.ndarray, rewards: np.ndarray) -> None:
        """One step of the optimizer, then the new baseline. rewards: (K,)."""
        earned = torch.as_tensor(rewards, dtype=torch.float32)
        self.baseline = float(earned.mean()) if self.baseline is None else self.baseline
        self.optimizer.zero_grad()
        log = self.policy(torch.as_tensor(actions))[1]
        (-(earned - self.baseline) * log).mean().backward()  # minus Eq. 6's estimate: optimizers descend
        self.optimizer.step()
        self.baseline = self.decay * self.baseline + (1 - self.decay) * float(np.mean(rewards))


class Uniform:
    """Random search: every legal pair of a layer is as likely as another, and nothing is learnt."""

    def __init__(self, states: np.ndarray, legal: np.ndarray, seed: int = 0):
        self.pairs, self.rng = [np.argwhere(layer) for layer in legal], np.random.default_rng(seed)

    def propose(self, count: int) -> np.ndarray:
        """int (K, N, 2), as `Reinforce.propose`."""
        return np.array([[pairs[self.rng.integers(len(pairs))] for pairs in self.pairs] for _ in range(count)])

    def learn(self, actions: np.ndarray, rewards: np.ndarray) -> None:
        """Nothing."""


STRATEGIES = {"rl": Reinforce, "random": Uniform}
