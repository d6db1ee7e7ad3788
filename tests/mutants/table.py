"""Mutants of the core: plausible mistakes, each with tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """A mistake in one place.

    Attributes:
        name: What is wrong.
        file: The file, under ``src/aptvit``.
        old: Text that occurs exactly once in it.
        new: The text that takes its place.
        tests: Test files or tests, under ``tests``, at least one of which must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def mutated(self, package: Path) -> str:
        """The text of the file with the mistake in it.

        Args:
            package: The folder of aptvit.

        Raises:
            ValueError: If the old text does not occur exactly once.
        """
        text = (package / self.file).read_text()
        if (number := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} holds this text {number} times, not once: {self.old!r}")
        return text.replace(self.old, self.new)


ADAPTIVE = "models/test_adaptive_vit.py"
ATTENTION = "layers/test_attention.py"
BLOCKS = "encoder/test_blocks.py"
CALL = "models/test_budget_of_a_call.py"
CLIPS = "encoder/test_clips.py"
DERIVED = "encoder/test_derived.py"
EMBED = "layers/test_patch_embed.py"
FEATURES = "layers/test_features.py"
GRAPHS = "layers/test_cuda_graphs.py"
IMAGES = "patching/test_images.py"
LAYOUT = "patching/test_layout.py"
PATCHIFIER = "patching/test_patchifier.py"
REDIRECT = "layers/test_redirect.py"
SCORING = "patching/test_scoring.py"
SELECTION = "patching/test_selection.py"
SHOWED = "mutants/test_what_mutants_showed.py"
TIMM = "hosts/test_timm.py"
TWO_PASS = "encoder/test_two_pass.py"
WINDOWS = "encoder/test_windows.py"

MUTANTS = (
    # Pixels and scores
    Mutant(
        "raw_pixels_are_not_normalised",
        "patching/images.py",
        "return (images.float() / 255 - mean) / std",
        "return images.float() / 255",
        (f"{PATCHIFIER}::test_raw_pixels_are_normalised",),
    ),
    Mutant(
        "mean_of_pixels_in_the_wrong_unit",
        "patching/images.py",
        "torch.addcmul(mean * 255, images.float(), std * 255)",
        "torch.addcmul(mean, images.float(), std * 255)",
        (f"{IMAGES}::test_pixels_are_what_was_normalised",),
    ),
    Mutant(
        "images_are_padded_at_the_left_and_top",
        "patching/images.py",
        "F.pad(images, (0, extra[1], 0, extra[0]))",
        "F.pad(images, (extra[1], 0, extra[0], 0))",
        (f"{IMAGES}::test_padding_adds_zeros_at_the_right_and_bottom",),
    ),
    Mutant(
        "rows_and_columns_of_a_grid_swapped",
        "patching/images.py",
        "return self.images.shape[2] // patch_size, self.images.shape[3] // patch_size",
        "return self.images.shape[3] // patch_size, self.images.shape[2] // patch_size",
        (f"{PATCHIFIER}::test_scores_come_by_group",),
    ),
    Mutant(
        "mean_of_gray_values_in_the_wrong_unit",
        "patching/entropy.py",
        "[255 * m for m in mean]",
        "[m for m in mean]",
        (f"{SCORING}::test_normalised_images_score_as_raw_ones[mean0-std0]",),
    ),
    Mutant(
        "gray_values_of_channels_in_reverse_order",
        "patching/entropy.py",
        "_GRAY = (2989.0, 5870.0, 1140.0)",
        "_GRAY = (1140.0, 5870.0, 2989.0)",
        (f"{SCORING}::test_entropy_is_that_of_histc_on_each_patch[16-whole numbers]",),
    ),
    # Which patches stay coarse
    Mutant(
        "a_score_at_the_threshold_stays_coarse",
        "patching/selection.py",
        "scores[2**i] < threshold",
        "scores[2**i] <= threshold",
        (f"{SELECTION}::test_a_score_equal_to_the_threshold_stays_fine",),
    ),
    Mutant(
        "finer_wins_over_coarser",
        "patching/selection.py",
        "for i, threshold in enumerate(thresholds, start=1):",
        "for i, threshold in reversed(list(enumerate(thresholds, start=1))):",
        (f"{SELECTION}::test_a_patch_is_coarse_where_its_score_is_below_and_nothing_coarser_covers_it",),
    ),
    Mutant(
        "shares_round_down_instead_of_to_the_nearest",
        "patching/selection.py",
        "merges = round((1 - keep) * num_patches / 3)",
        "merges = math.ceil((1 - keep) * num_patches / 3)",
        (f"{SELECTION}::test_share_gives_all_images_the_same_count_nearest_to_the_wish",),
    ),
    Mutant(
        "a_merge_may_come_before_its_parts",
        "patching/selection.py",
        "cost = torch.maximum(cost, finer.amax((2, 4)))",
        "cost = torch.maximum(cost, finer.mean((2, 4)))",
        (f"{SELECTION}::test_share_merges_what_a_greedy_search_merges",),
    ),
    Mutant(
        "the_most_complex_patches_are_merged_first",
        "patching/selection.py",
        "flat.sort(dim=1, stable=True)",
        "flat.sort(dim=1, stable=True, descending=True)",
        (f"{SELECTION}::test_share_merges_what_a_greedy_search_merges",),
    ),
    Mutant(
        "one_negative_threshold_means_that_nothing_merges",
        "patching/selection.py",
        "all(t < 0 for t in budget.thresholds or ())",
        "any(t < 0 for t in budget.thresholds or ())",
        (f"{PATCHIFIER}::test_one_scale_needs_no_scores",),
    ),
    Mutant(
        "max_batch_tokens_is_no_limit",
        "patching/selection.py",
        "(budget.min_keep, budget.max_tokens, budget.max_batch_tokens) != (0, None, None)",
        "(budget.min_keep, budget.max_tokens) != (0, None)",
        (f"{SHOWED}::test_a_batch_of_several_sizes_is_cut_to_its_limit",),
    ),
    Mutant(
        "max_tokens_ignores_prefix_tokens",
        "patching/limits.py",
        "least = max(0, math.ceil((num_patches + num_prefix_tokens - budget.max_tokens) / 3))",
        "least = max(0, math.ceil((num_patches - budget.max_tokens) / 3))",
        (f"{SELECTION}::test_no_image_exceeds_its_cap_and_those_within_it_stay_as_they_are",),
    ),
    Mutant(
        "max_batch_tokens_ignores_prefix_tokens",
        "patching/limits.py",
        "tokens = sum(count * (num_patches + num_prefix_tokens)",
        "tokens = sum(count * num_patches",
        (f"{SELECTION}::test_no_batch_exceeds_its_cap",),
    ),
    Mutant(
        "max_batch_tokens_ignores_min_keep",
        "patching/limits.py",
        "0, 1 + protected.int()",
        "0, 1 + 0 * protected.int()",
        (f"{SHOWED}::test_min_keep_holds_while_a_batch_can_do_with_it",),
    ),
    Mutant(
        "blends_count_from_the_share",
        "patching/limits.py",
        "* (budget.blend or 0.0)",
        "* (1 - (budget.blend or 0.0))",
        (f"{SELECTION}::test_a_blend_lies_between_thresholds_and_share",),
    ),
    Mutant(
        "min_keep_is_stronger_than_max_tokens",
        "patching/limits.py",
        "merges.clamp(max=_most_merges(budget, num_patches, available)).clamp(min=least)",
        "merges.clamp(min=least).clamp(max=_most_merges(budget, num_patches, available))",
        (f"{SHOWED}::test_max_tokens_is_stronger_than_min_keep",),
    ),
    Mutant(
        "min_keep_rounds_the_wrong_way",
        "patching/limits.py",
        "math.floor((1 - budget.min_keep) * num_patches / 3 + 1e-9)",
        "math.ceil((1 - budget.min_keep) * num_patches / 3 - 1e-9)",
        (f"{SELECTION}::test_no_image_falls_below_its_floor",),
    ),
    Mutant(
        "budgets_of_calls_forget_max_tokens",
        "patching/budget.py",
        "budget = self if max_tokens is None else replace(self, max_tokens=max_tokens)",
        "budget = self",
        (f"{CALL}::test_it_is_the_budget_of_the_model_for_one_call[{{'max_tokens': 40}}]",),
    ),
    Mutant(
        "patchifier_ignores_the_budget_of_the_call",
        "patching/patchifier.py",
        "budget = self._budget if budget is None else budget",
        "budget = self._budget",
        (f"{CALL}::test_it_is_the_budget_of_the_model_for_one_call[{{'keep': 0.4}}]",),
    ),
    Mutant(
        "model_ignores_the_budget_of_the_call",
        "models/adaptive_vit.py",
        "return self.patchifier.budget.for_call(**call) if call else self.patchifier.budget",
        "return self.patchifier.budget",
        (f"{CALL}::test_it_is_the_budget_of_the_model_for_one_call[{{'keep': 0.4}}]",),
    ),
    # Layouts
    Mutant(
        "cumulative_lengths_are_off_by_one",
        "patching/layout.py",
        "torch.tensor([0, *itertools.accumulate(seqlens)], dtype=torch.int32)",
        "torch.tensor([*itertools.accumulate(seqlens, initial=1)], dtype=torch.int32)",
        (f"{LAYOUT}::test_packing_knows_the_run_of_each_token",),
    ),
    Mutant(
        "one_prefix_token_at_most_before_the_patches_of_an_image",
        "patching/layout.py",
        "first.add_(self.image, alpha=prefix)",
        "first.add_(self.image, alpha=min(prefix, 1))",
        (f"{LAYOUT}::test_tokens_come_in_raster_order_and_can_be_put_back",),
    ),
    Mutant(
        "cells_are_restored_from_a_corner_of_half_the_side",
        "patching/layout.py",
        "inside = -1 << scale",
        "inside = -1 << (scale - 1).clamp(min=0)",
        (f"{LAYOUT}::test_images_of_different_grids_share_one_layout",),
    ),
    Mutant(
        "prefix_tokens_of_ragged_images_are_off_by_one",
        "patching/layout.py",
        "tokens[self.cu_seqlens[:-1, None].long() + front]",
        "tokens[self.cu_seqlens[:-1, None].long() + front + 1]",
        (f"{FEATURES}::test_prefix_is_the_front_of_each_image",),
    ),
    Mutant(
        "padding_is_part_of_the_last_image",
        "patching/layout.py",
        "Packing.from_offsets([*self.seqlens, num_tokens], offsets,",
        "Packing.from_offsets([*self.seqlens[:-1], self.seqlens[-1] + num_tokens], offsets,",
        (f"{GRAPHS}::test_feature_maps_of_padded_sequences[vit_tiny_patch16_224]",),
    ),
    Mutant(
        "a_batch_is_uniform_if_its_first_image_is",
        "patching/layout.py",
        "for _, *coarser in self.counts)",
        "for _, *coarser in self.counts[:1])",
        (f"{ADAPTIVE}::test_padding",),
    ),
    Mutant(
        "windows_are_not_tiled",
        "patching/windows.py",
        ".unflatten(1, (-1, window_size)).transpose(2, 3)",
        ".unflatten(1, (-1, window_size))",
        (f"{LAYOUT}::test_window_order_keeps_the_tokens_of_a_window_together",),
    ),
    Mutant(
        "prefix_tokens_are_the_last_window",
        "patching/windows.py",
        "for length in (num_prefix_tokens, *image) if length",
        "for length in (*image, num_prefix_tokens) if length",
        (f"{WINDOWS}::test_windows_are_runs_of_the_same_order",),
    ),
    Mutant(
        "images_that_are_not_finite_are_counted_in_their_group",
        "patching/patchifier.py",
        "finite[group.index] = _finite(group.images, group_scores).char()",
        "finite[: len(group.index)] &= _finite(group.images, group_scores).char()",
        (f"{PATCHIFIER}::test_an_image_with_nan_or_infinite_pixels_is_named[nan]",),
    ),
    Mutant(
        "grids_of_a_mixed_batch_are_transposed",
        "patching/patchifier.py",
        "grid_sizes[image] = (rows, cols)",
        "grid_sizes[image] = (cols, rows)",
        (f"{PATCHIFIER}::test_a_list_of_different_sizes_is_cut_as_each_image_by_itself",),
    ),
    Mutant(
        "padding_counts_as_tokens",
        "patching/features.py",
        "valid = step < lengths",
        "valid = step <= lengths",
        (f"{FEATURES}::test_padded_has_one_row_per_image",),
    ),
    # Embedding
    Mutant(
        "reduction_reads_pixels_beside_the_middle",
        "layers/patch_embed.py",
        "    middle = slice(factor // 2 - 1, factor // 2 + 1)\n    return blocks",
        "    middle = slice(factor // 2 - 1, factor // 2)\n    return blocks",
        (f"{EMBED}::test_patches_that_are_only_resized",),
    ),
    Mutant(
        "reduction_averages_all_pixels",
        "layers/patch_embed.py",
        "blocks[:, :, :, middle, :, middle].mean((3, 5))",
        "blocks.mean((3, 5))",
        (f"{EMBED}::test_patches_that_are_only_resized",),
    ),
    Mutant(
        "resized_weight_averages_all_pixels",
        "layers/patch_embed.py",
        "kernel[factor // 2 - 1 : factor // 2 + 1] = 0.5",
        "kernel[:] = 1 / factor",
        (f"{EMBED}::test_resized_weight_reads_the_patch_as_bilinear_reduction_does[4]",),
    ),
    Mutant(
        "composed_convolution_is_transposed",
        "layers/patch_embed.py",
        "grown[:, :, i, :, j] =",
        "grown[:, :, j, :, i] =",
        (f"{EMBED}::test_both_ways_are_equation_2[True-2]",),
    ),
    Mutant(
        "sub_patches_are_transposed_in_training",
        "layers/patch_embed.py",
        "embedded = embedded + coarse(blocks[image, row, col])",
        "embedded = embedded + coarse(blocks[image, row, col].mT)",
        (f"{EMBED}::test_both_ways_are_equation_2[True-2]",),
    ),
    Mutant(
        "composed_branch_has_no_bias_of_the_convolution",
        "layers/patch_embed.py",
        "bias + linear(offset[None])[0]",
        "bias + linear(torch.zeros_like(offset)[None])[0]",
        (f"{EMBED}::test_both_ways_are_equation_2[True-2]",),
    ),
    Mutant(
        "unit_patches_are_not_bright",
        "layers/patch_embed.py",
        "2.0**12 if black.dtype == torch.float16 else 2.0**20",
        "1.0",
        (f"{EMBED}::test_the_map_of_a_base_patch_is_the_patch_embedding_itself",),
    ),
    Mutant(
        "two_prefix_tokens_are_taken_for_one",
        "layers/patch_embed.py",
        "        if prefix > 1:\n",
        "        if prefix > 2:\n",
        (f"{TIMM}::test_with_nothing_merged_the_model_is_the_host[deit_tiny_distilled_patch16_224]",),
    ),
    Mutant(
        "images_of_a_mixed_batch_are_read_by_their_place_in_the_batch",
        "layers/patch_embed.py",
        "number, torch.arange(len(group.index))",
        "number, torch.tensor(group.index)",
        (f"{EMBED}::test_rows_made_scale_by_scale_reach_their_place_in_the_packed_sequence[0-True]",),
    ),
    Mutant(
        "patches_of_a_mixed_batch_are_sorted_by_group_then_scale",
        "layers/patch_embed.py",
        "key = key * len(groups) + number_of",
        "key = number_of * layout.num_scales + key",
        (f"{EMBED}::test_rows_made_scale_by_scale_reach_their_place_in_the_packed_sequence[0-True]",),
    ),
    Mutant(
        "pixels_of_a_patch_are_transposed",
        "layers/kernels/gather_torch.py",
        ".permute(0, 2, 4, 1, 3, 5)",
        ".permute(0, 2, 4, 1, 5, 3)",
        (f"{EMBED}::test_gathered_patches_are_the_slices",),
    ),
    # Positions
    Mutant(
        "position_tables_start_one_row_early",
        "layers/position_embed.py",
        "starts = 1 + sizes[:, 0].cumsum(0) - sizes[:, 0]",
        "starts = sizes[:, 0].cumsum(0) - sizes[:, 0]",
        (f"{TIMM}::test_with_nothing_merged_the_model_is_the_host[vit_tiny_patch16_224]",),
    ),
    Mutant(
        "prefix_tokens_are_rotated",
        "layers/position_embed.py",
        "torch.cat([no_rotation(rotary_tables[0]), *rotary_tables], dim=-2)",
        "torch.cat([rotary_tables[0][..., 1:2, :], *rotary_tables], dim=-2)",
        (f"{TIMM}::test_with_nothing_merged_the_model_is_the_host[eva02_tiny_patch14_224]",),
    ),
    Mutant(
        "positions_of_windows_are_not_tiled",
        "layers/position_embed.py",
        "row, col = cells % columns if self.tiled else cells",
        "row, col = cells.clamp(max=columns - 1) if self.tiled else cells",
        (f"{WINDOWS}::test_with_nothing_merged_it_is_the_dense_windowed_model[4-global_blocks1]",),
    ),
    Mutant(
        "rotation_at_centres_is_that_of_the_first_cell",
        "layers/rotary.py",
        "cells[..., :, middle, :, middle, :].sum((-4, -2))",
        "cells[..., :, :1, :, :1, :].sum((-4, -2))",
        (f"{EMBED}::test_dinov3_rotation_at_centres[grid0-2]",),
    ),
    Mutant(
        "positions_of_coarse_patches_are_stretched_over_the_grid",
        "hosts/timm.py",
        "if grid_size == (rows * factor, cols * factor):",
        "if rows * cols:",
        (f"{TIMM}::test_positions_of_coarse_patches_stay_where_the_patches_are",),
    ),
    Mutant(
        "prefix_tokens_have_no_position",
        "hosts/timm.py",
        "prefix = prefix + vit.pos_embed[0, : self.num_prefix_tokens]",
        "pass",
        (f"{TIMM}::test_with_nothing_merged_the_model_is_the_host[vit_tiny_patch16_224]",),
    ),
    Mutant(
        "all_blocks_rotate_as_the_first",
        "hosts/timm.py",
        'return [{"rope": table} for table in rotation]',
        'return [{"rope": rotation[0]}] * len(rotation)',
        (f"{TIMM}::test_with_nothing_merged_the_model_is_the_host[vit_small_patch16_rope_mixed_224]",),
    ),
    Mutant(
        "norm_before_the_blocks_is_left_out",
        "hosts/timm.py",
        "self.vit.norm_pre(self.vit.pos_drop(x))",
        "self.vit.pos_drop(x)",
        (f"{TIMM}::test_with_nothing_merged_the_model_is_the_host[vit_xsmall_patch16_clip_224]",),
    ),
    Mutant(
        "padding_is_pooled",
        "hosts/timm.py",
        "        if valid is None:\n",
        "        if tokens is not None:\n",
        (f"{TIMM}::test_a_packed_batch_is_one_image_at_a_time[avg]",),
    ),
    Mutant(
        "kept_positions_are_those_of_any_grid",
        "encoder/encoder.py",
        "derived.get((grid_sizes, num_scales, tiled), compute)",
        "derived.get((len(grid_sizes), num_scales, tiled), compute)",
        (f"{TIMM}::test_other_sizes_are_those_of_a_host_with_dynamic_size[vit_tiny_patch16_224]",),
    ),
    # Attention
    Mutant(
        "a_batch_of_equal_lengths_is_one_sequence",
        "layers/kernels/attention_sdpa.py",
        "tokens[0].unflatten(0, (len(packing.seqlens), packing.seqlens[0]))",
        "tokens[0].unflatten(0, (1, -1))",
        (f"{ATTENTION}::test_no_image_sees_another[equal]",),
    ),
    Mutant(
        "ragged_attention_has_no_bias",
        "layers/kernels/attention_sdpa.py",
        "query, key, value, attn_mask=mask",
        "query, key, value, attn_mask=None",
        (f"{ATTENTION}::test_a_bias_makes_keys_count_more_often[None-8-ragged-sdpa]",),
    ),
    Mutant(
        "scale_follows_the_size_of_values",
        "layers/kernels/packed_attention.py",
        "1 / math.sqrt(q.shape[-1])",
        "1 / math.sqrt(v.shape[-1])",
        (f"{ATTENTION}::test_values_may_have_another_size_than_queries[ragged]",),
    ),
    Mutant(
        "shared_keys_go_to_the_wrong_heads",
        "layers/attention.py",
        "key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)",
        "key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)",
        (f"{ATTENTION}::test_packed_is_one_image_at_a_time[2-None-ragged-sdpa]",),
    ),
    Mutant(
        "one_intercepted_attention_call_is_enough",
        "layers/attention.py",
        "if handler.calls == expected:",
        "if handler.calls > 0:",
        (f"{REDIRECT}::test_all_attention_of_a_block_is_packed_or_all_calls_are_watched",),
    ),
    Mutant(
        "a_plain_batch_has_no_bias",
        "layers/attention.py",
        "self.images.is_dense and self.key_bias is None and self.key_index is None",
        "self.images.is_dense and self.key_index is None",
        (f"{BLOCKS}::test_images_of_equal_length[vit_tiny_patch16_224]",),
    ),
    Mutant(
        "values_are_not_selected_as_keys_are",
        "layers/attention.py",
        "value.index_select(2, plan.key_index)",
        "value[:, :, : len(plan.key_index)]",
        (f"{TWO_PASS}::test_fine_tokens_see_what_the_first_pass_left[vit-size0]",),
    ),
    Mutant(
        "all_blocks_read_the_cache_of_the_first",
        "layers/attention.py",
        "else plan.cached[block]",
        "else plan.cached[0]",
        (f"{TWO_PASS}::test_fine_tokens_see_what_the_first_pass_left[vit-size0]",),
    ),
    Mutant(
        "windows_are_ignored",
        "layers/attention.py",
        "segments = plan.windows if windowed and plan.windows is not None else plan.images",
        "segments = plan.images",
        (f"{WINDOWS}::test_with_nothing_merged_it_is_the_dense_windowed_model[4-global_blocks1]",),
    ),
    Mutant(
        "global_blocks_are_the_windowed_ones",
        "encoder/encoder.py",
        "number not in self.global_blocks",
        "number in self.global_blocks",
        (f"{WINDOWS}::test_with_nothing_merged_it_is_the_dense_windowed_model[4-global_blocks1]",),
    ),
    Mutant(
        "area_bias_has_the_wrong_sign",
        "encoder/encoder.py",
        "self.area_bias * math.log(4) * layout.scale",
        "-self.area_bias * math.log(4) * layout.scale",
        (f"{BLOCKS}::test_at_one_a_patch_weighs_as_much_as_those_it_replaces[vit_tiny_patch16_224]",),
    ),
    # Stochastic depth
    Mutant(
        "stochastic_depth_drops_tokens",
        "layers/kernels/drop_images.py",
        "kept = x.new_empty(images.cu_seqlens.shape[0] - 1).bernoulli_(1 - p)\n"
        "    if p < 1:\n"
        "        kept = kept / (1 - p)\n"
        "    return x * kept[images.sequence_of_token(x.shape[1])][None, :, None]",
        "kept = x.new_empty(x.shape[1]).bernoulli_(1 - p)\n"
        "    if p < 1:\n"
        "        kept = kept / (1 - p)\n"
        "    return x * kept[None, :, None]",
        (f"{ATTENTION}::test_all_tokens_of_an_image_share_its_fate[ragged]",),
    ),
    Mutant(
        "stochastic_depth_of_a_plain_batch_sees_no_images",
        "encoder/encoder.py",
        "and self.attention is None and not self.is_training:",
        "and self.attention is None:",
        (f"{SHOWED}::test_stochastic_depth_drops_images_of_equal_length_as_a_whole",),
    ),
    Mutant(
        "unscaled_stochastic_depth_is_scaled",
        "layers/drop_path.py",
        "return x if self.scale_by_keep else x * (1 - self.drop_prob)",
        "return x",
        (f"{ATTENTION}::test_unscaled_stochastic_depth_keeps_what_it_keeps",),
    ),
    # What is kept between calls
    Mutant(
        "kept_maps_always_hold",
        "encoder/derived.py",
        "for _, cached in pairs]) == now if",
        "for _, cached in pairs]) < torch.inf if",
        (f"{DERIVED}::test_a_change_is_seen[parameter.data]",),
    ),
    Mutant(
        "fingerprint_without_the_coarse_branch",
        "encoder/derived.py",
        "parts.append(coarse(parts[-1][:1]))",
        "parts.append(parts[-1][:1])",
        (f"{ADAPTIVE}::test_changed_weights_are_seen[no_grad-change_in_place]",),
    ),
    Mutant(
        "maps_checked_only_where_nothing_merges",
        "models/adaptive_vit.py",
        "needs_scores(budget) if layout is None else not layout.is_uniform",
        "not needs_scores(budget) if layout is None else layout.is_uniform",
        (f"{DERIVED}::test_a_change_is_seen[parameter.data]",),
    ),
    Mutant(
        "fingerprint_without_positions",
        "encoder/derived.py",
        "parts = [noise[:0], *adapter.position_parameters()]",
        "parts = [noise[:0]]",
        (f"{ADAPTIVE}::test_changed_weights_are_seen[no_grad-change_position]",),
    ),
    Mutant(
        "no_gradient_in_evaluation",
        "models/adaptive_vit.py",
        "directly = torch.is_grad_enabled() or self.training",
        "directly = self.training",
        (f"{ADAPTIVE}::test_gradients_are_the_same_after_evaluation",),
    ),
    Mutant(
        "layouts_of_other_images_are_taken",
        "models/adaptive_vit.py",
        "            check_layout(layout, groups, self.patchifier)\n",
        "",
        (f"{ADAPTIVE}::test_a_layout_of_other_images_or_of_another_model_is_refused",),
    ),
    # Ways to run the blocks
    Mutant(
        "first_passes_of_several_sizes_are_not_shifted",
        "encoder/two_pass.py",
        "position[group.index, :rows, :cols] = first.position + start",
        "position[group.index, :rows, :cols] = first.position",
        (f"{TWO_PASS}::test_a_batch_is_its_images[images-0.0]",),
    ),
    Mutant(
        "the_second_pass_has_no_area_bias",
        "encoder/two_pass.py",
        "full_plan.key_bias, self.source, cached",
        "None, self.source, cached",
        (f"{TWO_PASS}::test_a_bias_is_of_coarse_keys",),
    ),
    Mutant(
        "coarse_tokens_come_from_the_block_before_the_last",
        "encoder/two_pass.py",
        "second.complete(outputs.x, number - 1)",
        "second.complete(outputs.x, number - 2)",
        (f"{TWO_PASS}::test_fine_tokens_see_what_the_first_pass_left[vit-size0]",),
    ),
    Mutant(
        "cached_keys_that_are_padded_shift_nothing",
        "encoder/buckets.py",
        "index = index + num_gap * (index >= num_cached)",
        "pass",
        (f"{GRAPHS}::test_two_passes_in_graphs[vit_tiny_patch16_224-0-images-64]",),
    ),
    Mutant(
        "frames_are_compared_with_the_frame_before",
        "encoder/clips.py",
        "cells[last_read, rows, cols]",
        "cells[time - 1, rows, cols]",
        (f"{CLIPS}::test_reference_is_what_was_read_last_not_the_frame_before",),
    ),
    Mutant(
        "tolerance_is_exclusive",
        "encoder/clips.py",
        "unchanged = change <= tolerance",
        "unchanged = change < tolerance",
        (f"{CLIPS}::test_what_changes_is_read",),
    ),
    Mutant(
        "coarse_patches_are_reused_cell_by_cell",
        "encoder/clips.py",
        "reusable |= at_scale & _all_in_square(unchanged_at_scale, 1 << scale)",
        "reusable |= unchanged_at_scale",
        (f"{SHOWED}::test_a_change_in_any_cell_of_a_coarse_patch_is_read",),
    ),
    Mutant(
        "scales_follow_noise_where_nothing_changed",
        "encoder/clips.py",
        "torch.where(_all_in_square(unchanged, block), scale_map[time - 1], scale_map[time])",
        "scale_map[time]",
        (f"{CLIPS}::test_decisions_do_not_flicker",),
    ),
    Mutant(
        "clips_have_no_area_bias",
        "encoder/clips.py",
        "None, frame_plan.key_bias, clip.row_index",
        "None, None, clip.row_index",
        (f"{BLOCKS}::test_saved_copied_and_in_a_clip[vit_tiny_patch16_224]",),
    ),
)
