"""Collaborative filtering: vectors of users and items, trained on train rows or brought along."""

from ckf.cf.fit import CFConfig, fit_cf, fit_lightgcn, fit_mf
from ckf.cf.fold_in import fit_fold_in, fold_in_users
from ckf.cf.vectors import CFVectors, load_vectors

__all__ = [
    "CFConfig",
    "CFVectors",
    "fit_cf",
    "fit_fold_in",
    "fit_lightgcn",
    "fit_mf",
    "fold_in_users",
    "load_vectors",
]
