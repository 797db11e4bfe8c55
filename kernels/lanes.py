"""Sub-blocks beside each other, as encoders want them: tile[element, lane], one sub-block a lane."""

from numba import njit

from edgemerge.kernels.llvm import transpose_four


@njit(cache=True, nogil=True, error_model="numpy")
def put_beside(x_f32, first, n_lanes, n, tile_f32, step):
    """Make sub-blocks the lanes of a tile: tile[k * step + lane] = x[n * (first + lane) + k].

    Parameters
    ----------
    x_f32 : (>= n * (first + n_lanes),) float32
        sub-blocks
    first, n_lanes : int
        from this one on, so many
    n : int
        elements of a sub-block, a multiple of 4
    tile_f32 : (>= n * step,) float32
        written, but for lanes from n_lanes on
    step : int
        lanes of the tile
    """
    n_fours = n_lanes // 4 * 4
    for lane in range(0, n_fours, 4):
        for k in range(0, n, 4):
            transpose_four(x_f32, n * (first + lane) + k, n, tile_f32, k * step + lane, step)
    for lane in range(n_fours, n_lanes):
        for k in range(n):
            tile_f32[k * step + lane] = x_f32[n * (first + lane) + k]
