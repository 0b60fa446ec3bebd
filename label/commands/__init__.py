"""The commands of `draftsmith label` that read and write labelled answers."""
