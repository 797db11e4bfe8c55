"""Work on other machines, by Dask: connecting, handing out calls, being a worker. It knows no merges."""
