"""Ray, for stages on a cluster: this folder and student_trainer/cluster alone import it."""
