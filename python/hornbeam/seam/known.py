"""Which names of Keras that are not public each operation needs, and what each is known to be: see `_names`."""

from __future__ import annotations

#: Operation → the modules of hornbeam that do it, and the functions of Keras that they replace.
OPERATIONS: dict[str, tuple[str, str]] = {
    "save": (
        (
            "flows.asset_store flows.recording flows.saves formats.save_adapters formats.save_formats formats.shards "
            "seam.keras_names seam.shortcuts seam.walking values.creating values.on_tensorflow values.tensors "
            "values.tf_variables"
        ),
        (
            "saving.saving_api.save_model saving.saving_api.save_weights saving.saving_lib.save_model "
            "saving.saving_lib._save_model_to_fileobj saving.saving_lib._save_model_to_dir "
            "saving.saving_lib.save_weights_only"
        ),
    ),
    "load": (
        (
            "flows.asset_store flows.loads flows.parts flows.recording flows.saves flows.selections flows.serving "
            "formats.load_formats formats.shards seam.assignments seam.building seam.keras2 seam.keras_names "
            "seam.missing_classes seam.shortcuts seam.walking values.creating values.holding values.on_tensorflow "
            "values.tensors values.tf_variables"
        ),
        (
            "saving.saving_api.load_model saving.saving_api.load_weights saving.saving_lib._load_model_from_fileobj "
            "saving.saving_lib._load_model_from_dir saving.saving_lib.load_weights_only"
        ),
    ),
    "legacy save": (
        (
            "flows.asset_store flows.recording flows.saves formats.legacy_save seam.keras_names seam.shortcuts "
            "seam.walking values.creating values.on_tensorflow values.tensors values.tf_variables"
        ),
        "legacy.saving.legacy_h5_format.save_model_to_hdf5",
    ),
    "legacy load": (
        (
            "flows.asset_store flows.loads flows.parts flows.recording flows.saves flows.selections flows.serving "
            "formats.legacy_load formats.legacy_save seam.assignments seam.building seam.keras2 seam.keras_names "
            "seam.missing_classes seam.shortcuts seam.walking values.creating values.holding values.on_tensorflow "
            "values.tensors values.tf_variables"
        ),
        "legacy.saving.legacy_h5_format.load_model_from_hdf5",
    ),
    "json": (
        (
            "formats.to_json seam.keras2 seam.keras_names seam.missing_classes seam.shortcuts values.creating "
            "values.on_tensorflow values.tf_variables"
        ),
        "models.model.Model.to_json models.model.model_from_json",
    ),
    "export": (
        "formats.exports seam.culprits seam.keras_names",
        (
            "export.saved_model.get_input_signature archive:track archive:add_endpoint archive:add_variable_collection "
            "archive:write_out"
        ),
    ),
    "safetensors": (
        (
            "flows.asset_store flows.loads flows.parts flows.recording flows.saves flows.selections flows.serving "
            "formats.safetensors formats.shards seam.assignments seam.building seam.keras2 seam.keras_names "
            "seam.missing_classes seam.shortcuts seam.walking values.creating values.holding values.on_tensorflow "
            "values.tensors values.tf_variables"
        ),
        "",
    ),
    "savedmodel": (
        (
            "flows.asset_store flows.loads flows.parts flows.recording flows.saves flows.selections flows.serving formats.exports "
            "formats.savedmodel seam.assignments seam.building seam.culprits seam.keras2 seam.keras_names "
            "seam.missing_classes seam.shortcuts seam.walking values.creating values.holding values.on_tensorflow "
            "values.tensors values.tf_variables"
        ),
        "",
    ),
    "training": (
        (
            "flows.parts flows.recording flows.selections flows.serving formats.operations seam.assignments "
            "seam.keras_names seam.walking training.backup training.fit training.matching training.model_checkpoint "
            "training.resumable training.training_state values.holding values.on_tensorflow values.randomness "
            "values.tensors"
        ),
        "",
    ),
    "partial save": (
        (
            "flows.parts flows.recording flows.serving seam.assignments seam.walking values.creating values.holding "
            "values.on_tensorflow values.tensors values.tf_variables"
        ),
        "",
    ),
}
#: Module of hornbeam → the names that it uses.
USES: dict[str, str] = {
    "flows.asset_store": (
        "saving.saving_lib saving.saving_lib.DiskIOStore saving.saving_lib._ASSETS_DIRNAME saving.saving_lib.file_utils "
        "saving.saving_lib.file_utils.rmtree saving.saving_lib.get_temp_dir"
    ),
    "flows.loads": (
        "keras.Layer:_non_trainable_variables keras.Layer:_trainable_variables saving.saving_lib "
        "saving.saving_lib.DiskIOStore saving.saving_lib.ObjectSharingScope saving.saving_lib._ASSETS_DIRNAME "
        "saving.saving_lib._CONFIG_FILENAME saving.saving_lib._VARS_FNAME_H5 saving.saving_lib._VARS_FNAME_NPZ "
        "saving.saving_lib._ZIP_CUMULATIVE_BOMB_FLOOR_BYTES saving.saving_lib._ZIP_EXTRACT_BOMB_FLOOR_BYTES "
        "saving.saving_lib._ZIP_MEMBER_BOMB_FLOOR_BYTES saving.saving_lib._ZIP_MEMBER_MAX_EXPANSION "
        "saving.saving_lib._load_state saving.saving_lib._raise_loading_failure "
        "saving.saving_lib.deserialize_keras_object saving.saving_lib.readable_memory_size"
    ),
    "flows.parts": "keras.Layer:_non_trainable_variables keras.Layer:_trainable_variables",
    "flows.recording": "saving.saving_lib saving.saving_lib.H5IOStore",
    "flows.saves": (
        "saving.saving_lib saving.saving_lib.ObjectSharingScope saving.saving_lib._ASSETS_DIRNAME "
        "saving.saving_lib._CONFIG_FILENAME saving.saving_lib._METADATA_FILENAME saving.saving_lib._VARS_FNAME_H5 "
        "saving.saving_lib._save_state saving.saving_lib.keras_version saving.saving_lib.serialize_keras_object"
    ),
    "flows.selections": (
        "keras.Layer:_non_trainable_variables keras.Layer:_trainable_variables saving.saving_lib "
        "saving.saving_lib._save_state"
    ),
    "flows.serving": "saving.saving_lib saving.saving_lib.H5IOStore",
    "formats.exports": (
        "archive:_endpoint_names archive:_endpoint_signatures archive:_get_concrete_fn archive:_print_signature "
        "archive:_tf_trackable saving.saving_lib saving.saving_lib.file_utils "
        "saving.saving_lib.file_utils.is_remote_path utils.io_utils utils.io_utils.print_msg "
        "utils.module_utils.tensorflow"
    ),
    "formats.legacy_load": (
        "backend.common.global_state backend.common.global_state.get_global_attribute "
        "keras.Layer:_non_trainable_variables keras.Layer:_trainable_variables layers legacy.saving.json_utils "
        "legacy.saving.json_utils._decode_helper legacy.saving.legacy_h5_format "
        "legacy.saving.legacy_h5_format._legacy_weights legacy.saving.saving_options "
        "legacy.saving.saving_options.keras_option_scope legacy.saving.saving_utils "
        "legacy.saving.saving_utils.MODULE_OBJECTS legacy.saving.saving_utils._deserialize_nested_config "
        "legacy.saving.saving_utils.model_from_config legacy.saving.saving_utils.try_build_compiled_arguments "
        "models.Functional saving.object_registration saving.object_registration.CustomObjectScope "
        "saving.object_registration.GLOBAL_CUSTOM_OBJECTS saving.object_registration.get_registered_object "
        "saving.serialization_lib saving.serialization_lib.SafeModeScope "
        "saving.serialization_lib.deserialize_keras_object"
    ),
    "formats.legacy_save": (
        "keras.Layer:_non_trainable_variables keras.Layer:_obj_type keras.Layer:_trainable_variables "
        "keras.Model:_compile_config layers legacy.saving.json_utils legacy.saving.json_utils.get_json_type "
        "legacy.saving.legacy_h5_format legacy.saving.legacy_h5_format.HDF5_OBJECT_HEADER_LIMIT "
        "legacy.saving.legacy_h5_format._legacy_weights legacy.saving.legacy_h5_format.save_attributes_to_hdf5_group "
        "legacy.saving.saving_options legacy.saving.saving_options.keras_option_scope legacy.saving.saving_utils "
        "legacy.saving.saving_utils._serialize_nested_config legacy.saving.saving_utils.model_metadata "
        "legacy.saving.serialization legacy.saving.serialization.serialize_keras_object saving.object_registration "
        "saving.object_registration.GLOBAL_CUSTOM_OBJECTS saving.object_registration.get_registered_name "
        "saving.saving_lib saving.saving_lib.file_utils saving.saving_lib.file_utils.is_remote_path "
        "saving.serialization_lib saving.serialization_lib.serialize_dict "
        "saving.serialization_lib.serialize_keras_object utils.io_utils utils.io_utils.ask_to_proceed_with_overwrite"
    ),
    "formats.load_formats": "utils.file_utils utils.file_utils.is_remote_path",
    "formats.operations": (
        "saving.saving_api saving.saving_api.load_model saving.saving_api.load_weights saving.saving_api.save_model "
        "saving.saving_api.save_weights"
    ),
    "formats.safetensors": (
        "saving.saving_lib saving.saving_lib.file_utils saving.saving_lib.file_utils.is_remote_path "
        "saving.saving_lib.readable_memory_size utils.io_utils utils.io_utils.ask_to_proceed_with_overwrite"
    ),
    "formats.save_adapters": "utils.file_utils utils.file_utils.is_remote_path",
    "formats.save_formats": "utils.file_utils utils.file_utils.is_remote_path utils.io_utils utils.io_utils.ask_to_proceed_with_overwrite",
    "formats.savedmodel": (
        "export.saved_model export.saved_model.DEFAULT_ENDPOINT_NAME export.saved_model.ExportArchive "
        "export.saved_model.get_input_signature keras.layers.TFSMLayer:_reloaded_obj saving.serialization_lib "
        "saving.serialization_lib.in_safe_mode utils.io_utils utils.io_utils.ask_to_proceed_with_overwrite "
        "utils.module_utils.tensorflow"
    ),
    "formats.shards": "saving.saving_lib saving.saving_lib.readable_memory_size utils.dtype_utils utils.dtype_utils.dtype_size",
    "formats.to_json": (
        "saving.serialization_lib saving.serialization_lib.deserialize_keras_object "
        "saving.serialization_lib.serialize_keras_object"
    ),
    "models": "models.model models.model.model_from_json",
    "saving": "saving.saving_api saving.saving_api.load_weights saving.saving_api.save_model saving.saving_api.save_weights",
    "seam.assignments": (
        "backend.common.stateless_scope.in_stateless_scope backend.common.variables.Variable "
        "backend.common.variables.Variable.assign keras.Variable:_dtype keras.Variable:_shape keras.Variable:_value "
        "saving.keras_saveable.KerasSaveable saving.saving_lib saving.saving_lib._load_state"
    ),
    "seam.building": (
        "backend.common.global_state backend.common.global_state.get_global_attribute "
        "backend.common.stateless_scope.get_stateless_scope backend.common.stateless_scope.in_stateless_scope "
        "backend.common.symbolic_scope.in_symbolic_scope backend.config backend.config.is_nnx_enabled "
        "backend.tensorflow.optimizer.TFOptimizer backend.tensorflow.optimizer.TFOptimizer._var_key "
        "backend.tensorflow.optimizer.TFOptimizer.add_variable_from_reference keras.Variable:_convert_to_tensor "
        "keras.Variable:_dtype keras.Variable:_initialize_with_initializer keras.Variable:_layout "
        "keras.Variable:_maybe_autocast keras.Variable:_shape keras.Variable:_value "
        "optimizers.base_optimizer.BaseOptimizer optimizers.base_optimizer.BaseOptimizer.add_variable_from_reference"
    ),
    "seam.culprits": "keras.Layer:_flatten_layers saving.saving_lib saving.saving_lib.serialize_keras_object",
    "seam.keras2": (
        "keras.Layer:_trainable_variables keras.optimizers.Optimizer:_learning_rate saving.object_registration "
        "saving.object_registration.get_registered_object"
    ),
    "seam.keras_names": (
        "saving.saving_lib saving.saving_lib.H5IOStore saving.saving_lib.file_utils "
        "saving.saving_lib.file_utils.is_remote_path"
    ),
    "seam.missing_classes": (
        "api_export api_export.get_symbol_from_name backend.common.global_state "
        "backend.common.global_state.get_global_attribute saving.object_registration "
        "saving.object_registration.GLOBAL_CUSTOM_OBJECTS saving.object_registration.get_registered_object "
        "saving.serialization_lib saving.serialization_lib.BUILTIN_MODULES"
    ),
    "seam.shortcuts": (
        "keras.Layer:_flatten_layers keras.Layer:_initialize_tracker keras.Layer:_tracker keras.Variable:_shape "
        "layers.layer layers.layer.inspect models.functional models.functional.copy models.sequential "
        "models.sequential.copy ops.operation ops.operation.inspect saving.serialization_lib "
        "saving.serialization_lib.serialize_keras_object utils.tracking utils.tracking.DotNotTrackScope "
        "utils.tracking.TrackedDict utils.tracking.TrackedList utils.tracking.TrackedSet utils.tracking.Tracker "
        "utils.tracking.is_tracking_enabled"
    ),
    "seam.walking": (
        "backend.common.global_state backend.common.global_state.get_global_attribute keras.Layer:_obj_type "
        "optimizers.base_optimizer.BaseOptimizer optimizers.base_optimizer.BaseOptimizer.save_own_variables "
        "saving.keras_saveable.KerasSaveable saving.saving_lib saving.saving_lib._name_key "
        "saving.saving_lib._walk_saveable saving.saving_lib.file_utils saving.saving_lib.get_attr_skipset "
        "saving.saving_lib.naming"
    ),
    "training.backup": (
        "keras.Layer:_flatten_layers keras.Model:_compile_metrics keras.Model:_get_metrics_result_or_logs "
        "keras.Model:_initial_epoch keras.Model:_symbolic_build keras.callbacks.BackupAndRestore:_should_save_on_batch "
        "keras.optimizers.Optimizer:_learning_rate utils.python_utils.pythonify_logs"
    ),
    "training.fit": (
        "trainers.data_adapters.array_data_adapter.ArrayDataAdapter trainers.data_adapters.data_adapter.DataAdapter "
        "trainers.data_adapters.data_adapter_utils trainers.data_adapters.data_adapter_utils.super_batch_iterator "
        "trainers.data_adapters.py_dataset_adapter.PyDatasetAdapter "
        "trainers.data_adapters.tf_dataset_adapter.TFDatasetAdapter trainers.epoch_iterator.EpochIterator"
    ),
    "training.matching": (
        "keras.Layer:_flatten_layers keras.Layer:_metrics keras.Layer:_non_trainable_variables "
        "keras.Layer:_seed_generators keras.Layer:_trainable_variables utils.naming.to_snake_case"
    ),
    "training.model_checkpoint": (
        "keras.callbacks.ModelCheckpoint:_get_file_path keras.callbacks.ModelCheckpoint:_set_monitor_op "
        "utils.io_utils.print_msg"
    ),
    "training.resumable": (
        "trainers.data_adapters.data_adapter.DataAdapter trainers.data_adapters.data_adapter_utils "
        "trainers.data_adapters.data_adapter_utils.get_jax_iterator "
        "trainers.data_adapters.data_adapter_utils.get_numpy_iterator "
        "trainers.data_adapters.data_adapter_utils.get_tensor_spec "
        "trainers.data_adapters.data_adapter_utils.get_torch_dataloader "
        "trainers.data_adapters.data_adapter_utils.super_batch_iterator"
    ),
    "training.training_state": "keras.Layer:_flatten_layers keras.Layer:_trainable_variables",
    "values.creating": "keras.Variable:_trainable",
    "values.randomness": (
        "backend.common.global_state backend.common.global_state.get_global_attribute "
        "backend.common.global_state.set_global_attribute random.seed_generator "
        "random.seed_generator.GLOBAL_SEED_GENERATOR random.seed_generator.global_seed_generator"
    ),
    "values.tf_variables": "keras.Variable:_map_aggregation keras.Variable:_map_synchronization keras.Variable:_value",
    "values.tensors": "keras.Variable:_value",
    "values.holding": "keras.Variable:_value",
    "values.on_tensorflow": "keras.Variable:_value",
}
#: Name → what it is known to be, in one Keras or another: its parameters, nothing for what is no function, `-` where it
#: may be missing.
KNOWN: dict[str, str] = {
    "api_export": "",
    "api_export.get_symbol_from_name": "(name)",
    "archive:_endpoint_names": "",
    "archive:_endpoint_signatures": "",
    "archive:_get_concrete_fn": "(self, endpoint)",
    "archive:_print_signature": "",
    "archive:_tf_trackable": "",
    "archive:add_endpoint": "(self, name, fn, input_signature, **kwargs)",
    "archive:add_variable_collection": "(self, name, variables)",
    "archive:track": "(self, resource)",
    "archive:write_out": "(self, filepath, options, verbose)",
    "backend.common.global_state": "",
    "backend.common.global_state.get_global_attribute": "(name, default, set_to_default)",
    "backend.common.global_state.set_global_attribute": "(name, value)",
    "backend.common.stateless_scope.get_stateless_scope": "()",
    "backend.common.stateless_scope.in_stateless_scope": "()",
    "backend.common.symbolic_scope.in_symbolic_scope": "()",
    "backend.common.variables.Variable": "",
    "backend.common.variables.Variable.assign": "(self, value)",
    "backend.config": "",
    "backend.config.is_nnx_enabled": "()",
    "backend.tensorflow.optimizer.TFOptimizer": "",
    "backend.tensorflow.optimizer.TFOptimizer._var_key": "(self, variable)",
    "backend.tensorflow.optimizer.TFOptimizer.add_variable_from_reference": "(self, reference_variable, name, initializer)",
    "export.saved_model": "",
    "export.saved_model.DEFAULT_ENDPOINT_NAME": "",
    "export.saved_model.ExportArchive": "",
    "export.saved_model.get_input_signature": "(model)",
    "keras.Layer:_flatten_layers": "(self, include_self, recursive)",
    "keras.Layer:_initialize_tracker": "(self)",
    "keras.Layer:_metrics": "",
    "keras.Layer:_non_trainable_variables": "",
    "keras.Layer:_obj_type": "(self)",
    "keras.Layer:_tracker": "",
    "keras.Layer:_seed_generators": "",
    "keras.Layer:_trainable_variables": "",
    "keras.Model:_compile_config": "",
    "keras.Model:_compile_metrics": "",
    "keras.Model:_get_metrics_result_or_logs": "(self, logs)",
    "keras.Model:_initial_epoch": "",
    "keras.Model:_symbolic_build": "(self, iterator, data_batch) | (self, data_batch)",
    "keras.Variable:_convert_to_tensor": "(self, value, dtype)",
    "keras.Variable:_dtype": "",
    "keras.Variable:_initialize_with_initializer": "(self, initializer)",
    "keras.Variable:_layout": "- | ",
    "keras.Variable:_map_aggregation": "(self, aggregation) | -",
    "keras.Variable:_map_synchronization": "(self, synchronization) | -",
    "keras.Variable:_maybe_autocast": "(self, value)",
    "keras.Variable:_shape": "",
    "keras.Variable:_trainable": "",
    "keras.Variable:_value": "",
    "keras.callbacks.BackupAndRestore:_should_save_on_batch": "(self, batch)",
    "keras.callbacks.ModelCheckpoint:_get_file_path": "(self, epoch, batch, logs)",
    "keras.callbacks.ModelCheckpoint:_set_monitor_op": "(self)",
    "keras.layers.TFSMLayer:_reloaded_obj": "",
    "keras.optimizers.Optimizer:_learning_rate": "",
    "layers": "",
    "layers.layer": "",
    "layers.layer.inspect": "",
    "legacy.saving.json_utils": "",
    "legacy.saving.json_utils._decode_helper": "(obj, deserialize, module_objects, custom_objects) | (obj)",
    "legacy.saving.json_utils.get_json_type": "(obj)",
    "legacy.saving.legacy_h5_format": "",
    "legacy.saving.legacy_h5_format.HDF5_OBJECT_HEADER_LIMIT": "",
    "legacy.saving.legacy_h5_format._legacy_weights": "(layer)",
    "legacy.saving.legacy_h5_format.load_model_from_hdf5": "(filepath, custom_objects, compile, safe_mode)",
    "legacy.saving.legacy_h5_format.save_attributes_to_hdf5_group": "(group, name, data)",
    "legacy.saving.legacy_h5_format.save_model_to_hdf5": "(model, filepath, overwrite, include_optimizer)",
    "legacy.saving.saving_options": "",
    "legacy.saving.saving_options.keras_option_scope": "(use_legacy_config)",
    "legacy.saving.saving_utils": "",
    "legacy.saving.saving_utils.MODULE_OBJECTS": "",
    "legacy.saving.saving_utils._deserialize_nested_config": "(deserialize_fn, config)",
    "legacy.saving.saving_utils._serialize_nested_config": "(config)",
    "legacy.saving.saving_utils.model_from_config": "(config, custom_objects)",
    "legacy.saving.saving_utils.model_metadata": "(model, include_optimizer, require_config)",
    "legacy.saving.saving_utils.try_build_compiled_arguments": "(model)",
    "legacy.saving.serialization": "",
    "legacy.saving.serialization.serialize_keras_object": "(instance)",
    "models.Functional": "",
    "models.functional": "",
    "models.functional.copy": "",
    "models.model": "",
    "models.model.Model.to_json": "(self, **kwargs)",
    "models.model.model_from_json": "(json_string, custom_objects)",
    "models.sequential": "",
    "models.sequential.copy": "",
    "ops.operation": "",
    "ops.operation.inspect": "",
    "optimizers.base_optimizer.BaseOptimizer": "",
    "optimizers.base_optimizer.BaseOptimizer.add_variable_from_reference": "(self, reference_variable, name, initializer)",
    "optimizers.base_optimizer.BaseOptimizer.save_own_variables": "(self, store)",
    "random.seed_generator": "",
    "random.seed_generator.GLOBAL_SEED_GENERATOR": "- | ",
    "random.seed_generator.global_seed_generator": "()",
    "saving.keras_saveable.KerasSaveable": "",
    "saving.object_registration": "",
    "saving.object_registration.CustomObjectScope": "",
    "saving.object_registration.GLOBAL_CUSTOM_OBJECTS": "",
    "saving.object_registration.get_registered_name": "(obj)",
    "saving.object_registration.get_registered_object": "(name, custom_objects, module_objects)",
    "saving.saving_api": "",
    "saving.saving_api.load_model": "(filepath, custom_objects, compile, safe_mode)",
    "saving.saving_api.load_weights": "(model, filepath, skip_mismatch, **kwargs)",
    "saving.saving_api.save_model": "(model, filepath, overwrite, zipped, **kwargs)",
    "saving.saving_api.save_weights": "(model, filepath, overwrite, max_shard_size, **kwargs)",
    "saving.saving_lib": "",
    "saving.saving_lib.DiskIOStore": "",
    "saving.saving_lib.H5IOStore": "",
    "saving.saving_lib.ObjectSharingScope": "",
    "saving.saving_lib._ASSETS_DIRNAME": "",
    "saving.saving_lib._CONFIG_FILENAME": "",
    "saving.saving_lib._METADATA_FILENAME": "",
    "saving.saving_lib._VARS_FNAME_H5": "",
    "saving.saving_lib._VARS_FNAME_NPZ": " | -",
    "saving.saving_lib._ZIP_CUMULATIVE_BOMB_FLOOR_BYTES": "- | ",
    "saving.saving_lib._ZIP_EXTRACT_BOMB_FLOOR_BYTES": " | -",
    "saving.saving_lib._ZIP_MEMBER_BOMB_FLOOR_BYTES": " | -",
    "saving.saving_lib._ZIP_MEMBER_MAX_EXPANSION": " | -",
    "saving.saving_lib._load_model_from_dir": "(dirpath, custom_objects, compile, safe_mode)",
    "saving.saving_lib._load_model_from_fileobj": "(fileobj, custom_objects, compile, safe_mode)",
    "saving.saving_lib._load_state": "(saveable, weights_store, assets_store, inner_path, skip_mismatch, visited_saveables, failed_saveables, error_msgs)",
    "saving.saving_lib._name_key": "(name)",
    "saving.saving_lib._raise_loading_failure": "(error_msgs, warn_only)",
    "saving.saving_lib._save_model_to_dir": "(model, dirpath, weights_format) | (model, dirpath)",
    "saving.saving_lib._save_model_to_fileobj": "(model, fileobj, weights_format) | (model, fileobj)",
    "saving.saving_lib._save_state": "(saveable, weights_store, assets_store, inner_path, visited_saveables)",
    "saving.saving_lib._walk_saveable": "(saveable)",
    "saving.saving_lib.deserialize_keras_object": "(config, custom_objects, safe_mode, **kwargs)",
    "saving.saving_lib.file_utils": "",
    "saving.saving_lib.file_utils.is_remote_path": "(filepath)",
    "saving.saving_lib.file_utils.rmtree": "(path)",
    "saving.saving_lib.get_attr_skipset": "(obj_type)",
    "saving.saving_lib.get_temp_dir": "()",
    "saving.saving_lib.keras_version": "",
    "saving.saving_lib.load_weights_only": "(model, filepath, skip_mismatch, objects_to_skip)",
    "saving.saving_lib.naming": "",
    "saving.saving_lib.readable_memory_size": "(weight_memory_size)",
    "saving.saving_lib.save_model": "(model, filepath, weights_format, zipped) | (model, filepath, zipped)",
    "saving.saving_lib.save_weights_only": "(model, filepath, max_shard_size, objects_to_skip)",
    "saving.saving_lib.serialize_keras_object": "(obj)",
    "saving.serialization_lib": "",
    "saving.serialization_lib.BUILTIN_MODULES": "",
    "saving.serialization_lib.SafeModeScope": "",
    "saving.serialization_lib.deserialize_keras_object": "(config, custom_objects, safe_mode, **kwargs)",
    "saving.serialization_lib.in_safe_mode": "()",
    "saving.serialization_lib.serialize_dict": "(obj)",
    "saving.serialization_lib.serialize_keras_object": "(obj)",
    "trainers.data_adapters.array_data_adapter.ArrayDataAdapter": "",
    "trainers.data_adapters.data_adapter.DataAdapter": "",
    "trainers.data_adapters.data_adapter_utils": "",
    "trainers.data_adapters.data_adapter_utils.get_jax_iterator": "(iterable)",
    "trainers.data_adapters.data_adapter_utils.get_numpy_iterator": "(iterable)",
    "trainers.data_adapters.data_adapter_utils.get_tensor_spec": "(batches)",
    "trainers.data_adapters.data_adapter_utils.get_torch_dataloader": "(iterable)",
    "trainers.data_adapters.data_adapter_utils.super_batch_iterator": "- | (iterator, super_batch, stack_fn)",
    "trainers.data_adapters.py_dataset_adapter.PyDatasetAdapter": "",
    "trainers.data_adapters.tf_dataset_adapter.TFDatasetAdapter": "",
    "trainers.epoch_iterator.EpochIterator": "",
    "utils.dtype_utils": "",
    "utils.dtype_utils.dtype_size": "(dtype)",
    "utils.file_utils": "",
    "utils.file_utils.is_remote_path": "(filepath)",
    "utils.io_utils": "",
    "utils.io_utils.ask_to_proceed_with_overwrite": "(filepath)",
    "utils.io_utils.print_msg": "(message, line_break)",
    "utils.module_utils.tensorflow": "",
    "utils.naming.to_snake_case": "(name)",
    "utils.python_utils.pythonify_logs": "(logs)",
    "utils.tracking": "",
    "utils.tracking.DotNotTrackScope": "",
    "utils.tracking.TrackedDict": "",
    "utils.tracking.TrackedList": "",
    "utils.tracking.TrackedSet": "",
    "utils.tracking.Tracker": "",
    "utils.tracking.is_tracking_enabled": "()",
}
