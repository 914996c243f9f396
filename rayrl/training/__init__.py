"""Trainings: each is one fit of Ray Train, with DeepSpeed around the model.

    sft, evaluator, reward_model, dpo, ppo   loops, one for each kind of training
    views                                    batches of the reward model's auxiliary loss
    rollout, served_policy                   responses and rewards that PPO learns from
    job, ppo_job                             arguments of the loops
    steps                                    resume, one optimizer step at a time, checkpoint
    launch, checkpoints                      the fit, and its checkpoints on storage
    deepspeed_engine                         the only user of DeepSpeed
    fragments                                state of its optimizers, for any number of ranks and any ZeRO stage
    sync                                     weights from the optimizer to the engines

A loop knows rows and models only: labels, budgets and stages are the callers'.
"""
