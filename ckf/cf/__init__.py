"""Collaborative filtering: vectors of users and items, trained on train rows or brought along."""

from ckf.cf.files import load_vectors
from ckf.cf.fit import CFConfig, fit_cf, fit_lightgcn, fit_mf
from ckf.cf.fold_in import fit_fold_in, fold_in_users
from ckf.cf.folds import fold_numbers
from ckf.cf.vectors import CFVectors

__all__ = [
    "CFConfig",
    "CFVectors",
    "fit_cf",
    "fit_fold_in",
    "fit_lightgcn",
    "fit_mf",
    "fold_in_users",
    "fold_numbers",
    "load_vectors",
]
