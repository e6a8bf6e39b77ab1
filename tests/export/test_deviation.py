"""The comparison's numbers equal their definitions, computed the long way in float64."""

import pytest
import torch

from qlora_kit.core.errors import DataError
from qlora_kit.export import deviation
from qlora_kit.export.deviation import compare
from tests import tiny_models


def batches():
    """Two batches of different lengths, with padding and prompts that do not count."""
    made = []
    for seed, (rows, length) in enumerate([(3, 9), (2, 5)]):
        ids = tiny_models.tokens(rows, length, seed=seed)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        labels[mask == 0] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def by_definition(reference, other):
    kl, same, losses, count = 0.0, 0, [0.0, 0.0], 0
    for batch in batches():
        with torch.no_grad():
            p, q = (
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                .logits.double()
                .softmax(-1)
                for model in (reference, other)
            )
        for row in range(p.shape[0]):
            for position in range(1, p.shape[1]):
                label = batch["labels"][row, position]
                if label == -100:
                    continue
                a, b = p[row, position - 1], q[row, position - 1]
                kl += (a * (a / b).log()).sum().item()
                same += int(a.argmax() == b.argmax())
                losses = [x - y[label].log().item() for x, y in zip(losses, (a, b), strict=True)]
                count += 1
    return kl / count, same / count, losses[0] / count, losses[1] / count, count


@pytest.fixture(scope="module")
def models():
    reference, other = tiny_models.build("llama"), tiny_models.build("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return reference, other


@pytest.mark.parametrize("chunk", [512, 3])
def test_equals_the_definition(models, monkeypatch, chunk):
    monkeypatch.setattr(deviation, "CHUNK_TOKENS", chunk)
    got = compare(*models, batches())
    kl, agreement, loss_reference, loss_other, tokens = by_definition(*models)
    bound = 1e-5  # float32 softmax over 256 classes
    assert got.tokens == tokens == 23
    assert got.top1_agreement == agreement
    assert 0.2 < agreement < 1
    assert got.kl == pytest.approx(kl, rel=bound)
    assert got.loss_reference == pytest.approx(loss_reference, rel=bound)
    assert got.loss_other == pytest.approx(loss_other, rel=bound)
    swapped = compare(*models[::-1], batches())
    assert swapped.kl != pytest.approx(kl, rel=100 * bound)  # KL has a direction
    assert swapped.loss_reference == pytest.approx(loss_other, rel=bound)


def test_a_model_does_not_deviate_from_itself(models):
    got = compare(models[0], models[0], batches())
    assert got.kl == 0.0
    assert got.top1_agreement == 1.0
    assert got.loss_other == got.loss_reference


def test_training_mode_is_put_back(models):
    reference, other = models
    reference.train()
    compare(reference, other, batches())
    assert reference.training
    assert not other.training
    reference.eval()


def test_logits_never_exceed_one_batch(models):
    """A generator that checks, when asked for the next batch, that the last one is gone."""
    import gc
    import weakref

    seen = []
    handle = models[0].register_forward_hook(
        lambda module, args, out: seen.append(weakref.ref(out.logits))
    )

    def stream():
        for batch in batches():
            gc.collect()
            assert all(ref() is None for ref in seen[:-1])
            yield batch

    try:
        compare(*models, stream())
    finally:
        handle.remove()
    assert len(seen) == 2


def test_nothing_to_compare_is_refused(models):
    ids = tiny_models.tokens()
    with pytest.raises(DataError, match="no token of the batches has a label"):
        compare(*models, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])
    small = tiny_models.build("llama", vocab_size=128)
    with pytest.raises(DataError, match="vocabularies of 256 and 128"):
        compare(models[0], small, [{"input_ids": ids % 128, "labels": ids % 128}])
