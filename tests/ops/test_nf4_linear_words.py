"""Words of memory that the blocks of a launch count in: whose they are, and when there are none."""

import itertools

import torch

from qlora_kit.ops.nf4_linear.words import Words


def test_words_of_streams_and_graphs(monkeypatch):
    """A stream's launches share theirs, each captured launch has its own; none means no words."""
    words, device = Words(), torch.device("cpu")
    now = [1, True]
    monkeypatch.setattr(words, "_stream", lambda device: tuple(now))
    monkeypatch.setattr(words, "_finish", lambda device: None)
    assert words.take(device) is None  # nothing can be made while capturing
    now[:] = 1, False
    first = words.take(device)
    assert not first.any()
    assert words.take(device).data_ptr() == first.data_ptr()
    now[:] = 2, False
    second = words.take(device)
    now[:] = 1, True
    taken = [first, second, *(words.take(device) for _ in range(5))]
    places = sorted(tensor.data_ptr() for tensor in taken)
    assert all(b - a >= 32 for a, b in itertools.pairwise(places))
    while words.take(device) is not None:
        pass
    now[:] = 1, False
    assert words.take(device).data_ptr() == first.data_ptr()
    now[:] = 1, True
    assert words.take(device) is not None  # another pool was made outside the capture
