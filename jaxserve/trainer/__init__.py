"""Training: elastic, preemptible, the same bits on any number of devices."""
