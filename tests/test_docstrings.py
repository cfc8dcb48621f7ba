"""Docstrings: what "Equivalent to" says is so. Of frameworks: tests/integrations/test_framework_pages.py."""

import inspect

import docstrings
import pytest

import trainops

PUBLIC = docstrings.public()
SNIPPETS = [(name, i) for name, about in PUBLIC.items() for i in range(len(docstrings.snippets(about)))]


@pytest.mark.parametrize(("name", "i"), SNIPPETS, ids=lambda x: str(x))
def test_equivalent_to(name, i):
    code = docstrings.snippets(PUBLIC[name])[i]
    docstrings.CASES.get(name, docstrings.call)(name, code)


def test_the_snippets_are_found():
    assert {name for name, _ in SNIPPETS} >= {"AdamW", "EMA", "clip_grad_norm_", "drop_path", "ema_update_"}
    assert SNIPPETS.count(("stochastic_depth", 1)) == 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("clip_grad_norm_", "torch.nn.utils.clip_grad_norm_(parameters, 2 * max_norm)"),
        ("drop_path", "timm.layers.drop_path(x, drop_prob / 2, training, scale_by_keep)"),
        ("get_total_norm", "torch.nn.utils.get_total_norm(tensors, 1.0)"),
        ("ema_update_", "torch._foreach_lerp_(ema_tensors, tensors, decay)"),
        ("get_ema_multi_avg_fn", "torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)"),
        (
            "stochastic_depth",
            "kept = torch.randperm(batch)[:1]; out = residual.clone(); out[kept] += branch(residual[kept])",
        ),
        ("AdamW", "optimizer.step()"),
        ("EMA.full_state_dict", "{'0.weight': 0 * averaged_model[0].weight}"),
    ],
)
def test_a_wrong_snippet_is_noticed(name, wrong):
    with pytest.raises(AssertionError):
        docstrings.CASES.get(name, docstrings.call)(name, wrong)


@pytest.mark.parametrize("name", trainops.__all__)
def test_what_is_public_says_what_it_is_and_its_arguments(name):
    about = getattr(trainops, name)
    text = inspect.getdoc(about)
    assert text.split("\n\n")[0].strip().endswith((".", "``", ":"))
    arguments = [
        key
        for key, x in inspect.signature(about).parameters.items()
        if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
    ]
    section = text.partition("Args:")[2]
    if inspect.isclass(about) and not section:  # the text of a small class names its fields
        return
    for argument in arguments:
        assert f"\n    {argument}: " in section, argument
