from onereward.pipelines.pipeline_onereward_mask import MaskConditions, OneRewardMaskPipeline
from onereward.pipelines.small import small_pipeline


__all__ = ["MaskConditions", "OneRewardMaskPipeline", "small_pipeline"]
