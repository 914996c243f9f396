"""The mathematics of rayrl: numpy and torch, no Ray, no I/O, no models.

| equation                                            | source              | function                      |
|-----------------------------------------------------|---------------------|-------------------------------|
| u = argmax_i min_{j in S} d(x_i, x_j)               | arXiv 1708.00489    | `selection.k_center`          |
| best against worst of k responses, ties dropped     | arXiv 2401.10020    | `pairing.best_worst`          |
| all (i, j) with s_i - s_j > margin                  | ours                | `pairing.margin_pairs`        |
| -log sigma(beta (h_w - h_l))                        | 2305.18290, Eq. 7   | `preference.dpo_loss` sigmoid |
| (h_w - h_l - 1 / (2 beta))^2                        | 2310.12036, Eq. 17  | `preference.dpo_loss` ipo     |
| -log sigma(r_w - r_l)                               | 2203.02155, Eq. 1   | `preference.bradley_terry_loss` |
| log pi(y, x) = sum_t (z_t[y_t] - logsumexp z_t)     | definition          | `preference.sequence_logprobs` |
| E[s] = sum_s s p(s) / sum_s p(s)                    | arXiv 2303.16634    | `scoring.expected_score`      |
| sigma(c), logit p = c + w tanh(dlen / std dlen)     | arXiv 2404.04475    | `statistics.length_controlled_win_rate` |
| mean of log pi - log pi_ref over y ~ pi             | definition          | `statistics.kl_estimate`      |
| exp(-sum log p / number of tokens)                  | definition          | `statistics.perplexity`       |
| distinct n-grams / n-grams                          | arXiv 1510.03055    | `statistics.distinct_n`       |
| BLEU of each text against the others                | arXiv 1802.01886    | `statistics.self_bleu`        |
"""
