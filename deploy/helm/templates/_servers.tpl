{{- /* host:port of each server: a replica of the StatefulSet has a name of its own */ -}}
{{- define "inplace.servers" -}}
{{- $name := printf "%s-server" .Release.Name -}}
{{- range $number := until (int .Values.server.replicas) -}}
{{- if $number }},{{ end }}{{ $name }}-{{ $number }}.{{ $name }}:8001
{{- end -}}
{{- end -}}
