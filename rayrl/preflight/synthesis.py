"""What synthetic pairs need beside the policy: the model that says which responses mean the same."""

from rayrl.config import RunConfig
from rayrl.models.mnli import check_labels
from rayrl.preflight.model import model_folder
from rayrl.runs import storage


def inspect_synthesis(config: RunConfig, *, online: bool) -> None:
    """Refuse models of synthetic preference generation that are not there, or are others; no weights are read.

    Of a model on the hub that is not here yet nothing is known unless `online`.

    Raises:
        ConfigError: no model folder, or an entailment model without the labels of MNLI.
    """
    spg = config.refresh.spg
    is_refreshed = config.pipeline == "rlp" and config.ppo.reward == "reward_model" and config.refresh.method == "spg"
    if not is_refreshed and not config.pseudo_label.synthetic:
        return
    if spg.embedder is not None:
        model_folder(spg.embedder, None, online=online, setting="refresh.spg.embedder")
    if spg.clustering == "embedding":
        return
    folder = model_folder(spg.entailment_model, None, online=online, setting="refresh.spg.entailment_model")
    if folder is not None:
        labels = storage.read_json(storage.join(folder, "config.json")).get("id2label") or {}
        check_labels(labels, spg.entailment_model)
