"""When a training takes in what the mesh did: at the first step that finds it, and never twice."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mesh.boundary import Boundaries, Progress
from mesh.tensors import Tensors

EVERY = 4


class Node:
    """The other end of a session: averages with another replica that moves by `other` a hand-over, and
    has the offer ready `late` steps after a post."""

    def __init__(self, fill, late, other):
        self.posted, self.offered = np.empty(1, np.float32), np.empty(1, np.float32)
        fill(self.posted)
        self.offered[:] = self.posted
        self.w, self.late, self.other = float(self.posted[0]), late, other
        self.holding, self.fresh, self.every = True, False, None
        self.polls, self.posts = 0, []

    def hears(self):
        return not self.holding

    def take_events(self, timeout_s):
        assert timeout_s == 0, "a step waits for nothing"
        self.polls += not self.holding
        if not self.holding and self.polls >= self.late:
            self.offered[:] = self.w
            self.holding = self.fresh = True
        return self.holding

    def merge(self, tensors):
        tensors.merge(self.posted, self.offered)
        self.fresh = False

    def want(self):
        pass

    def post(self, *, step, **figures):
        assert self.holding
        self.posts.append((step, float(self.posted[0])))
        self.w += float(self.posted[0] - self.offered[0]) + self.other
        self.holding = self.fresh = False
        self.polls = 0


@pytest.mark.parametrize(("late", "arrives_at"), [(1, 5), (3, 7), (4, 8), (6, 10)])
def test_what_an_exchange_brought_is_in_the_model_as_soon_as_it_is_there(late, arrives_at):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    tensors, progress, merged = Tensors(model), Progress(), []
    node = Node(tensors.fill, late, other=100.0)
    keeper = SimpleNamespace(merged=lambda session, step: merged.append(step))
    attachment = SimpleNamespace(session=node, or_alone=lambda: torch.no_grad())
    boundaries = Boundaries(tensors, attachment, keeper, progress, every=EVERY, patience=0.0)
    seen = []
    for _ in range(13):
        with torch.no_grad():
            model.weight += 1.0
        progress.steps += 1
        boundaries.step()
        seen.append(model.weight.item())
    assert merged[0] == arrives_at
    assert seen[: arrives_at - 1] == [float(k) for k in range(1, arrives_at)]
    assert seen[arrives_at - 1] == arrives_at + 100.0
    own = seen[-1] - 100.0 * len(merged)
    assert own == 13, "own steps count once"
    assert node.w == pytest.approx(node.posts[-1][0] + 100.0 * len(node.posts))
