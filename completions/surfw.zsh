
#compdef surfw

_surfw_completion() {
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _SURFW_COMPLETE=complete_zsh surfw)
}

compdef _surfw_completion surfw
