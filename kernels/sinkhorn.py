"""Entropic optimal transport on a sparse support, in the log domain (Cuturi 2013)."""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import exp, log


@njit(cache=True, nogil=True)
def sweep(cost_f64, indptr_i32, indices_i32, reg, n_sweeps, work_f64, duals_f64):
    """Update both dual potentials a number of times: Sinkhorn's iteration on a CSR pattern.

    Maximises the dual of min <P, C> - reg * H(P) with P 1 = P^T 1 = 1/n and P zero off the pattern
    (Cuturi 2013, eq. 2; Peyre and Cuturi 2019, eq. 4.43 for the log domain), columns first as POT's
    `sinkhorn_log` does: g_j = reg (log 1/n - LSE_i (f_i - C_ij) / reg), then f_i likewise over j.
    Column sums are scattered over the rows, so no transposed pattern is needed.

    Parameters
    ----------
    cost_f64 : (nnz,) float64
        cost of each allowed pair, any unit
    indptr_i32, indices_i32 : (n + 1,), (nnz,) int32
        CSR pattern; every row and column has an entry
    reg : float
        entropy weight, unit of cost; smaller is sharper and slower
    n_sweeps : int
        updates of both potentials
    work_f64 : (2, n) float64
        overwritten with nothing of use
    duals_f64 : (2, n) float64
        f of the rows and g of the columns, unit of cost; read and updated
    """
    n = duals_f64.shape[1]
    f = duals_f64[0]
    g = duals_f64[1]
    highest = work_f64[0]
    total = work_f64[1]
    log_mass = -log(np.float64(n))
    for _ in range(n_sweeps):
        for j in range(n):
            highest[j] = -np.inf
            total[j] = 0.0
        for i in range(n):
            for p in range(indptr_i32[i], indptr_i32[i + 1]):
                j = indices_i32[p]
                highest[j] = max(highest[j], (f[i] - cost_f64[p]) / reg)
        for i in range(n):
            for p in range(indptr_i32[i], indptr_i32[i + 1]):
                j = indices_i32[p]
                total[j] += exp((f[i] - cost_f64[p]) / reg - highest[j])
        for j in range(n):
            g[j] = reg * (log_mass - highest[j] - log(total[j]))
        for i in range(n):
            top = -np.inf
            for p in range(indptr_i32[i], indptr_i32[i + 1]):
                top = max(top, (g[indices_i32[p]] - cost_f64[p]) / reg)
            mass = 0.0
            for p in range(indptr_i32[i], indptr_i32[i + 1]):
                mass += exp((g[indices_i32[p]] - cost_f64[p]) / reg - top)
            f[i] = reg * (log_mass - top - log(mass))


@njit(cache=True, nogil=True)
def fill_plan(cost_f64, indptr_i32, indices_i32, reg, duals_f64, plan_f64):
    """Compute the transport plan of two potentials: P_ij = exp((f_i + g_j - C_ij) / reg).

    Parameters
    ----------
    cost_f64 : (nnz,) float64
        cost of each allowed pair
    indptr_i32, indices_i32 : (n + 1,), (nnz,) int32
        CSR pattern
    reg : float
        entropy weight, unit of cost
    duals_f64 : (2, n) float64
        f of the rows and g of the columns
    plan_f64 : (nnz,) float64
        written: mass of each allowed pair; rows sum to 1/n after `sweep`
    """
    for i in range(duals_f64.shape[1]):
        for p in range(indptr_i32[i], indptr_i32[i + 1]):
            gain = duals_f64[0, i] + duals_f64[1, indices_i32[p]] - cost_f64[p]
            plan_f64[p] = exp(gain / reg)
