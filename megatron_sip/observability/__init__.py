"""What a run tells its user: metrics, timers, console lines, recorded samples, alarms and the HTML report."""
