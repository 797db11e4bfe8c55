"""Many sites: a registry of signed files, the update of a device, and the reports that devices leave."""
