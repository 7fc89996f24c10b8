"""One model cut over several processes: who they are, what each holds, where they add up."""
