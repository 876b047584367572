import pytest
import torch

from agents.sampling import Decoding, draw


def make_logits(seed=0, shape=(2, 3, 1, 8)):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_distribution(logits, decoding, null=None):
    """Probabilities of one place as a list, by sorting and cutting."""
    scores = [float(x) for x in logits]
    if null is not None:
        scores = [float(n) + decoding.guidance * (s - float(n)) for s, n in zip(scores, null, strict=True)]
    p = torch.tensor(scores).div(decoding.temperature).softmax(0).tolist()
    order = sorted(range(len(p)), key=lambda v: -p[v])
    kept = order[: decoding.top_k or len(p)]
    total = sum(p[v] for v in kept)
    nucleus, mass = [], 0.0
    for v in kept:
        if mass >= decoding.top_p:
            break
        nucleus.append(v)
        mass += p[v] / total
    total = sum(p[v] for v in nucleus)
    return [p[v] / total if v in nucleus else 0.0 for v in range(len(p))]


DECODINGS = [
    Decoding(),
    Decoding(temperature=0.5),
    Decoding(top_k=3),
    Decoding(top_p=0.8),
    Decoding(temperature=1.3, top_k=5, top_p=0.7),
    Decoding(top_k=4, guidance=3.0),
    Decoding(top_k=1),
]


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_logp_support_and_tail_match_a_naive_loop(decoding):
    logits = make_logits()
    null = make_logits(seed=1) if decoding.guided else None
    drawn = draw(logits, null, decoding, torch.Generator().manual_seed(0))
    assert drawn.tokens.shape == drawn.logp.shape == drawn.tail_mass.shape == (2, 3, 1)
    for b in range(2):
        for i in range(3):
            p = naive_distribution(logits[b, i, 0], decoding, None if null is None else null[b, i, 0])
            token = int(drawn.tokens[b, i, 0])
            assert p[token] > 0
            assert drawn.logp[b, i, 0].exp().item() == pytest.approx(p[token], rel=1e-4)
            model = logits[b, i, 0].softmax(0).tolist()  # conditional, temperature 1
            outside = sum(q for q, kept in zip(model, p, strict=True) if kept == 0)
            assert drawn.tail_mass[b, i, 0].item() == pytest.approx(outside, abs=1e-5)
            if drawn.support is not None:
                assert drawn.support[b, i, 0].tolist() == [q > 0 for q in p]
    assert (drawn.support is None) == (not decoding.truncated)


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=0.7, top_k=4, top_p=0.9)], ids=str)
def test_frequencies(decoding):
    logits = make_logits(shape=(1, 1, 1, 6))
    tokens = draw(logits.expand(20000, 1, 1, 6), None, decoding, torch.Generator().manual_seed(0)).tokens
    frequencies = torch.bincount(tokens.flatten(), minlength=6) / 20000
    expected = torch.tensor(naive_distribution(logits[0, 0, 0], decoding))
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)


def test_zero_temperature_is_greedy():
    logits = make_logits()
    drawn = draw(logits, None, Decoding(temperature=0))
    assert torch.equal(drawn.tokens, logits.argmax(-1))
    assert (drawn.logp == 0).all()


def test_untruncated_model_sampling_has_the_models_logp_and_no_tail():
    logits = make_logits()
    drawn = draw(logits, None, Decoding())
    torch.testing.assert_close(drawn.logp, logits.log_softmax(-1).gather(-1, drawn.tokens[..., None])[..., 0])
    assert (drawn.tail_mass == 0).all()


@pytest.mark.parametrize("decoding", [*DECODINGS, Decoding(temperature=0)], ids=str)
def test_never_changes_its_inputs_and_repeats_with_a_seed(decoding):
    logits, null = make_logits(), make_logits(seed=1)
    copies = logits.clone(), null.clone()
    first = draw(logits, null, decoding, torch.Generator().manual_seed(5))
    again = draw(logits, null, decoding, torch.Generator().manual_seed(5))
    assert torch.equal(logits, copies[0]) and torch.equal(null, copies[1])
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.logp, again.logp)


def test_bitwise_codes():
    drawn = draw(make_logits(shape=(2, 5, 16, 2)), None, Decoding(top_p=0.9))
    assert drawn.tokens.shape == (2, 5, 16) and drawn.tokens.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature .* -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -2}, "top_k .* -2"),
        ({"top_p": 0.0}, r"top_p .* 0\.0"),
        ({"top_p": 1.5}, r"top_p .* 1\.5"),
        ({"guidance": -1.0}, "guidance"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


def test_guidance_needs_null_logits():
    with pytest.raises(ValueError, match="null_logits"):
        draw(make_logits(), None, Decoding(guidance=2.0))


def test_non_finite_logits():
    with pytest.raises(RuntimeError, match="not finite"):
        draw(make_logits().fill_(float("nan")), None, Decoding())
