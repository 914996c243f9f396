"""The mathematics of rayrl: numpy and torch, no Ray, no I/O, no models.

A setting that chooses among algorithms names an entry of a dictionary. A new choice is one pure function and one entry
beside it: `selection.strategies.STRATEGIES`, `pairing.PAIRINGS`, `kl.KL_ESTIMATORS`, `clustering.CLUSTERINGS`,
`advantages.ADVANTAGES`, `preference.PREFERENCE_LOSSES`, `rewards.ENSEMBLE_OBJECTIVES`, `information.UML_OBJECTIVES`.
Configs read the first five themselves, whose modules therefore load neither torch nor scipy. They repeat the names of
the last three.

| equation                                            | source              | function                      |
|-----------------------------------------------------|---------------------|-------------------------------|
| ceil((B - spent) / rounds left)                     | ours                | `budget.round_share`          |
| min(floor(waiting / 2) - starting, max - replicas)  | ours                | `scaling.scale_decision`      |
| u = argmax_i min_{j in S} d(x_i, x_j)               | arXiv 1708.00489    | `selection.k_center`          |
| P(i) ~ min_{j in S} d(x_i, x_j)^2                   | k-means++, 2007     | `selection.k_means_pp`        |
| the same on std_m(s_m) x                            | arXiv 1906.03671    | `selection.badge`             |
| argmax_i sum_j w_j max(0, D_j - d(x_i, x_j)^2)      | arXiv 1411.0541     | `selection.facility_location` |
| argmax_i log det(V + x_i x_i')                      | arXiv 2503.01076    | `selection.d_optimal`         |
| argmax_i std_m s_m(x_i)                             | Seung et al., 1992  | `selection.uncertainty`       |
| argmax_i H(mean_r p(s | x_i, r))                    | Settles, 2009       | `selection.score_entropy`     |
| H(mean_m p_m) - mean_m H(p_m)                       | arXiv 1112.5745     | `selection.bald`              |
| |mean_m d_m| + std_m d_m                            | arXiv 2603.09692    | `selection.delta_ucb`         |
| argmin_w sum c (y - w.x)^2 + ridge |w - prior|^2    | arXiv 1806.03335    | `heads.fit_heads`             |
| best against worst of k responses, ties dropped     | arXiv 2401.10020    | `pairing.best_worst`          |
| all (i, j) with s_i - s_j > margin                  | ours                | `pairing.margin_pairs`        |
| the preference of both orders of a pair, else a tie | 2306.05685, 3.4     | `comparisons.agreed`          |
| -log sigma(beta (h_w - h_l))                        | 2305.18290, Eq. 7   | `preference.sigmoid_loss`     |
| the same, unbiased under flipped labels             | arXiv 2403.00409    | `preference.robust_loss`      |
| (h_w - h_l - 1 / (2 beta))^2                        | 2310.12036, Eq. 17  | `preference.ipo_loss`         |
| -log sigma(r_w - r_l)                               | 2203.02155, Eq. 1   | `preference.bradley_terry_loss` |
| log pi(y, x) = sum_t (z_t[y_t] - logsumexp z_t)     | definition          | `preference.token_logprobs`    |
| sum_t w_t log pi(y_t), w = 1 to |y'|, then alpha    | 2409.06411, Eq. 10  | `preference.desensitised_weights` |
| -log pi(y_w) / |y_w|                                | 2404.19733, Eq. 1   | `preference.mean_nll`         |
| min(1, exp(m_w + m_l))                              | arXiv 2406.11827    | `preference.on_policy_weights` |
| k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d          | Schulman, kl-approx | `kl.KL_ESTIMATORS`            |
| c (1 + e n / horizon), e = clip(KL / KL* - 1)       | 1909.08593, 2.2     | `ppo.adapted_kl_coef`         |
| r_t = -c KL_t, + the score at the last t            | 1909.08593, Eq. 2   | `ppo.shaped_rewards`          |
| A_t = sum_l (gamma lambda)^l delta_{t+l}            | 1506.02438, Eq. 16  | `advantages.gae`              |
| A_i = R_i - sum_{j != i} R_j / (k - 1)              | arXiv 2402.14740    | `advantages.rloo`             |
| A_i = R_i - mean_j R_j                              | 2503.20783, 3.2     | `advantages.group_mean`       |
| A_i = (R_i - mean_j R_j) / std_j R_j                | 2402.03300, 4.1.2   | `advantages.group_normalised` |
| stop after `patience` losses in a row >= the lowest | Prechelt 1998       | `early_stopping.EarlyStopping` |
| max(-A rho, -A clip(rho, 1 - eps, 1 + eps))         | 1707.06347, Eq. 7   | `ppo.policy_loss`             |
| the same, 1 + eps_high in place of 1 + eps          | 2503.14476, 3.1     | `ppo.policy_loss`             |
| min(pi_old / pi_sampler, cap)                       | 1802.01561, 4.1     | `ppo.truncated_importance`    |
| max((V - R)^2, (clip V - R)^2) / 2                  | arXiv 2005.12729    | `ppo.value_loss`              |
| mean_i r_i, min_i r_i, mean_i r_i - c var_i r_i     | arXiv 2310.02743    | `rewards.ensemble_reward`     |
| (r_a(y_w) r_a(y_l))^m, r_a = p / (a p + (1 - a) q)  | arXiv 2507.15507    | `rewards.ocrm_weights`        |
| -I(z1; z2) + SKL(N(mu1, sigma1), N(mu2, sigma2))    | 2403.19279, 4.2     | `information.uml_loss`        |
| E_joint[-softplus(-T)] - E_product[softplus(T)]     | 1808.06670, Eq. 4   | `information.jensen_shannon_mi` |
| E_joint[T] - E_product[exp T] + 1                   | 1905.06922, 2       | `information.mi_nats`         |
| (KL(p, q) + KL(q, p)) / 2 of diagonal Gaussians     | definition          | `information.symmetric_kl`    |
| -log sigma(r_w - r_l) + beta (KL(z_w) + KL(z_l))    | arXiv 2402.09345    | `information.bottleneck_losses` |
| KL(N(mu, sigma), N(0, 1)) of diagonal Gaussians     | definition          | `information.kl_to_standard_normal` |
| -log exp(cos_ii / tau) / sum_j exp(cos_ij / tau)    | 1807.03748, Eq. 4   | `information.info_nce`        |
| d (alpha - beta log d), d = sqrt KL                 | 2210.10760, 3.1     | `overoptimisation.fit_gold_curve` |
| {rho: (a - rho b)^2 <= t^2 var(a - rho b)}          | Fieller, 1954       | `overoptimisation.turning_point` |
| i ~ j: each entails the other; join first seed      | arXiv 2302.09664    | `clustering.strict_clusters`  |
| i ~ j: no contradiction; join last text             | its release         | `clustering.kuhn2023_clusters` |
| i ~ j: no contradiction, one entails; join last seed | s41586-024-07421-0  | `clustering.farquhar2024_clusters` |
| i ~ j: cos_ij >= threshold; join first seed         | ours                | `clustering.embedding_clusters` |
| largest cluster's best against another cluster's    | 2403.19279, 4.2     | `synthesis.synthetic_pair`    |
| E[s] = sum_s s p(s) / sum_s p(s)                    | arXiv 2303.16634    | `scoring.expected_score`      |
| sigma(c), logit p = c + w tanh(dlen / std dlen)     | arXiv 2404.04475    | `statistics.length_controlled_win_rate` |
| sum_b n_b / n |confidence_b - accuracy_b|           | 1706.04599, Eq. 3   | `statistics.expected_calibration_error` |
| mean of log pi - log pi_ref over y ~ pi             | definition          | `statistics.kl_estimate`      |
| log n - (n - 1) / n                                 | arXiv 2401.01879    | `statistics.best_of_n_kl`     |
| exp(-sum log p / number of tokens)                  | definition          | `statistics.perplexity`       |
| a - b n^-c, a - b exp(-n / c)                       | arXiv 2103.10948    | `curve_families.FAMILIES`     |
| range over curves of misfit <= the least + 2.71     | profile likelihood  | `curve_families.fit_curves`   |
| v_prompts / P + v_labels / N + spread / splits      | after Nadeau, Bengio 2003 | `learning_curve.learning_curve` |
| distinct n-grams / n-grams                          | arXiv 1510.03055    | `statistics.distinct_n`       |
| BLEU of each text against the others                | arXiv 1802.01886    | `statistics.self_bleu`        |
"""
