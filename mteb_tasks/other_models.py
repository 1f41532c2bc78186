"""What is known of published models of others that are asked as E5-V is, for their entries.

A fact is here only if the authors' repository states it, or mteb's own entry of that model. ``published_e5v.py``
has the words that they are asked with. What is not known stays open: LamRA has no row for want of facts that could be
looked up.
"""

from __future__ import annotations

from typing import Any

_UNITE: dict[str, Any] = {
    # Stage 1 on friedrichor/Unite-Base-Retrieval-Train; of stage 2, on MMEB-train, mteb names no tasks either
    "training_datasets": set(),
    "license": "apache-2.0",
    "public_training_code": "https://github.com/friedrichor/UNITE",
    "public_training_data": "https://huggingface.co/datasets/friedrichor/Unite-Base-Retrieval-Train",
    "max_tokens": 32768,
    "citation": r"""
@article{kong2025modality,
  author = {Kong, Fanheng and Zhang, Jingyuan and Liu, Yahui and Zhang, Hongzhi and Feng, Shi and Yang, Xiaocui and Wang, Daling and Tian, Yu and W., Victoria and Zhang, Fuzheng and Zhou, Guorui},
  journal = {arXiv preprint arXiv:2505.19650},
  title = {Modality Curation: Building Universal Embeddings for Advanced Multimodal Information Retrieval},
  year = {2025},
}
""",  # noqa: E501 - as mteb's tests of citations want it
}

#: Fields of ``ModelMeta`` by hub id.
FACTS: dict[str, dict[str, Any]] = {
    # mteb 2.26, models/model_implementations/unite_models.py
    "friedrichor/Unite-Base-Qwen2-VL-2B": {
        **_UNITE,
        "revision": "850056e7a4b4129768e1c76795eac3c4331de76d",
        "release_date": "2025-05-28",
        "n_parameters": 2_208_985_600,
        "n_embedding_parameters": 233_373_696,
        "memory_usage_mb": 8427,
        "embed_dim": 1536,
        "reference": "https://huggingface.co/friedrichor/Unite-Base-Qwen2-VL-2B",
        "adapted_from": "Qwen/Qwen2-VL-2B-Instruct",
    },
    # deepglint/UniME, README.md: the release, the two stages of training, the citation. It names no licence, publishes
    # no training script, and does not list the data; sizes are read from the files once they are here
    "DeepGlint-AI/UniME-LLaVA-1.6-7B": {
        "release_date": "2025-04-22",
        "reference": "https://huggingface.co/DeepGlint-AI/UniME-LLaVA-1.6-7B",
        "citation": r"""
@misc{gu2025breakingmodalitybarrieruniversal,
  archiveprefix = {arXiv},
  author = {Tiancheng Gu and Kaicheng Yang and Ziyong Feng and Xingjun Wang and Yanzhao Zhang and Dingkun Long and Yingda Chen and Weidong Cai and Jiankang Deng},
  eprint = {2504.17432},
  primaryclass = {cs.CV},
  title = {Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs},
  url = {https://arxiv.org/abs/2504.17432},
  year = {2025},
}
""",  # noqa: E501 - as mteb's tests of citations want it
    },
}
