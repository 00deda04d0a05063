{{/* The CA's configuration file. */}}
{{- define "meshca.caConfig" -}}
{{- $ca := .Values.ca }}
{{- $publish := deepCopy ($ca.publish | default dict) }}
{{- if not (kindIs "invalid" $publish.agents) }}
{{- fail "ca.publish.agents: where agents read the trust bundle is trust.configMap" }}
{{- end }}
{{- if not (kindIs "invalid" $publish.agentsRefresh) }}
{{- fail "ca.publish.agentsRefresh: that of agents is trust.refresh" }}
{{- end }}
{{- $_ := set $publish "agentsRefresh" .Values.trust.refresh }}
{{- $_ := set $publish "agents" (dict "namespace" .Release.Namespace "name" .Values.trust.configMap) }}
{{- $own := dict
  "name" .Values.cluster
  "mode" $ca.attestation
  "agents" (list (printf "%s/%s" .Release.Namespace (include "meshca.agentName" .)))
  "publish" $publish
}}
{{- if $ca.signers }}
{{- $_ := set $own "signers" $ca.signers }}
{{- end }}
{{- $config := dict
  "trustDomain" .Values.trustDomain
  "opsAddress" ":9090"
  "clusters" (prepend ($ca.clusters | default list) $own)
}}
{{- if $ca.upstream.vault }}
{{- $vault := deepCopy $ca.upstream.vault }}
{{- if ($vault.auth | default dict).kubernetes }}
{{- $vault = merge $vault (dict "auth" (dict "kubernetes" (dict "tokenFile" "/var/run/secrets/vault/token"))) }}
{{- end }}
{{- $_ := set $config "upstream" (dict "vault" $vault) }}
{{- else }}
{{- $_ := set $config "upstream" (dict "disk" $ca.upstream.disk) }}
{{- end }}
{{- if $ca.policy }}
{{- $_ := set $config "policyFile" "/etc/meshca-policy/policy.yaml" }}
{{- end }}
{{- toYaml (mergeOverwrite $config (deepCopy ($ca.config | default dict))) }}
{{- end }}

{{/* The agents' configuration file. */}}
{{- define "meshca.agentConfig" -}}
{{- $agent := .Values.agent }}
{{- $shared := ($agent.config | default dict).sharedSocket }}
{{- if and (kindIs "map" $shared) ($shared | default dict).enabled }}
{{- if not $agent.sharedSocket.enabled }}
{{- fail "agent.config.sharedSocket.enabled: set agent.sharedSocket.enabled, which gives the agents the hostPID that it needs" }}
{{- end }}
{{- end }}
{{- $config := dict
  "trustDomain" .Values.trustDomain
  "cluster" .Values.cluster
  "server" ($agent.server | default (printf "%s.%s.svc:8443" .Release.Name .Release.Namespace))
  "tokenFile" "/var/run/secrets/meshca/token"
  "bundleFile" "/etc/meshca-trust/bundle.json"
  "runtimeDir" $agent.runtimeDir
  "stateDir" $agent.runtimeDir
  "cleanUp" true
  "opsAddress" ":9091"
  "csi" (dict "enabled" true "driver" $agent.csi.driver "kubeletDir" $agent.csi.kubeletDir)
}}
{{- if $agent.sharedSocket.enabled }}
{{- $_ := set $config "sharedSocket" (dict "enabled" true) }}
{{- end }}
{{- if $agent.startupTaint.enabled }}
{{- $_ := set $config "startupTaint" $agent.startupTaint.key }}
{{- end }}
{{- toYaml (mergeOverwrite $config (deepCopy ($agent.config | default dict))) }}
{{- end }}
