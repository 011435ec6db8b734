"""In: a model and token sequences. Out: factors.json, what each expert is used for and what each bit-width would cost.

Read statistics.py first. sensitivity.py runs the model forwards and backwards for the loss's gradients;
expert_tokens.py has the tokens of an expert and their second moments, expert_errors.py what its quantisation costs on
them; linear_errors.py has that of the other linears and of the output head; output_gradients.py keeps what quantising
wants to know of the loss; super_experts.py finds the few that a model depends on; factors.py is the file.
"""
