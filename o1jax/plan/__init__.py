"""What a run asks of devices that are not there: memory, arithmetic, communication, time, cost."""
