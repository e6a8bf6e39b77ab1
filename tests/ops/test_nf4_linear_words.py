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


def test_as_many_words_as_a_launch_counts_in(monkeypatch):
    """A stream's grow with its launches; a captured one gets what it asks for or nothing."""
    words, device = Words(), torch.device("cpu")
    now = [1, False]
    monkeypatch.setattr(words, "_stream", lambda device: tuple(now))
    monkeypatch.setattr(words, "_finish", lambda device: None)
    few = words.take(device, 20)
    assert few.shape == (20,)
    assert words.take(device, 500).data_ptr() == few.data_ptr()
    many = words.take(device, 5000)
    assert many.shape == (5000,)
    assert many.data_ptr() != few.data_ptr()
    assert words.take(device).data_ptr() == many.data_ptr()
    assert words.take(device, 1 << 20) is None
    now[1] = True
    captured = words.take(device, 5001)
    assert captured.shape == (5001,)
    assert not captured.any()
    assert captured.data_ptr() >= many.data_ptr() + 4 * 5000
    while words.take(device, 1 << 15) is not None:
        pass
    assert words.take(device, 1 << 15) is None
    assert words.take(device, 8) is not None  # of what is left
