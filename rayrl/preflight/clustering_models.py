"""Checks of the models that find responses of the same meaning: the entailment model and the embedder."""

from rayrl.config import RunConfig
from rayrl.models.mnli import check_labels
from rayrl.preflight.model import model_folder
from rayrl.preflight.weights import read_json_file
from rayrl.runs import storage
from rayrl.runs.stage_table import ENTAILMENT, SYNTHESIZE, clustering_embedders

_ENTAILMENT_MODEL = "refresh.spg.entailment_model"


def inspect_clustering_models(config: RunConfig, *, online: bool) -> None:
    """Refuse a clustering model that is not where the config says, or is of another kind; no weights are read.

    Nothing is known of a model on the hub that is not in the cache yet, unless `online`.

    Raises:
        ConfigError: no model folder, or an entailment model without the labels of MNLI.
    """
    if not SYNTHESIZE.occurs(config, 1):
        return
    spg, fleets = config.refresh.spg, SYNTHESIZE.fleets(config)
    clusters_by_entailment = ENTAILMENT in fleets
    clusters = clusters_by_entailment or clustering_embedders(config) in fleets
    # Embeddings are tried where entailment accepts no prompt: the embedder must be there in both cases.
    if clusters and spg.embedder is not None:
        model_folder(spg.embedder, None, online=online, setting="refresh.spg.embedder")
    if not clusters_by_entailment:
        return
    folder = model_folder(spg.entailment_model, None, online=online, setting=_ENTAILMENT_MODEL)
    if folder is not None:
        labels = read_json_file(storage.join(folder, "config.json"), _ENTAILMENT_MODEL).get("id2label") or {}
        check_labels(labels, spg.entailment_model)
