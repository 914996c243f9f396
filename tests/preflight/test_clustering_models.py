"""Models that find responses of the same meaning."""

from rayrl.errors import ConfigError
from tests.preflight.trees import FUNCTION, changed, plan_of, refusal, save_model


def test_an_entailment_model_that_is_none_is_refused(rlp_tree, tmp_path):
    message = refusal(ConfigError, changed(rlp_tree, refresh__spg__entailment_model="/nowhere/nli"))
    assert "refresh.spg.entailment_model must be a model folder or a hub id, got /nowhere/nli" in message
    two = save_model(tmp_path / "two", id2label={"0": "NO", "1": "YES"})
    message = refusal(ConfigError, changed(rlp_tree, refresh__spg__entailment_model=two))
    assert "must have the labels contradiction, neutral, entailment" in message and "NO, YES" in message
    assert "with none" in refusal(
        ConfigError, changed(rlp_tree, refresh__spg__entailment_model=rlp_tree["policy"]["path"])
    )
    for unused in ({"refresh__spg__clustering": "embedding"}, {"refresh__method": "uml"}, FUNCTION):
        plan_of(rlp_tree, **unused, refresh__spg__entailment_model="/nowhere/nli")


def test_an_embedder_that_is_none_is_refused(rlp_tree):
    message = refusal(ConfigError, changed(rlp_tree, refresh__spg__embedder="/nowhere/sentences"))
    assert "refresh.spg.embedder must be a model folder or a hub id, got /nowhere/sentences" in message
    plan_of(rlp_tree, refresh__spg__embedder="/nowhere/sentences", refresh__method="ocrm")
