"""Maintainers' scripts: the embedded model's first step, and the merge of its second; not part of a wheel."""
