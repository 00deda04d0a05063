package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Envoys in pods speak mTLS with what is in their volumes, each request with a handshake of its own, while SVIDs are
// renewed and the agent is replaced: no request fails, and both proxies end up on new certificates.
func proxies(t *testing.T, s *site) {
	server := s.create(t, sidecar("server", serverConfig("spiffe://mesh.test/ns/shop/sa/client")))
	check(t, s.PodReady(t.Context(), namespace, "server"))
	address := s.get(t, server).Status.PodIP
	client := s.create(t, sidecar("client", clientConfig(address, idOf(server))))
	check(t, s.PodReady(t.Context(), namespace, "client"))
	call := func(ctx context.Context) error {
		answer, err := s.Exec(ctx, namespace, "client", "/inpod", "fetch", "http://127.0.0.1:8080")
		if err == nil && answer != "spiffe://mesh.test/ns/shop/sa/client" {
			err = fmt.Errorf("the server was called by %q", answer)
		}
		return err
	}
	s.eventually(t, "an answer over mTLS", call)

	ctx, end := context.WithCancel(t.Context())
	var calls int
	var traffic sync.WaitGroup
	defer func() { end(); traffic.Wait() }()
	traffic.Go(func() {
		for ; ctx.Err() == nil; calls++ {
			if err := call(context.WithoutCancel(ctx)); err != nil {
				t.Errorf("request %d: %v", calls, err)
			}
		}
	})
	served := func(pod *corev1.Pod) string {
		answer, err := s.Exec(t.Context(), namespace, pod.Name, "/inpod", "fetch", "http://127.0.0.1:9901/certs")
		if err != nil {
			return ""
		}
		return serialOf(answer, idOf(pod))
	}
	rotated := func(why string) {
		before := map[*corev1.Pod]string{server: served(server), client: served(client)}
		s.renew(t)
		for pod, old := range before {
			s.eventually(t, why+": a new certificate in "+pod.Name, func(context.Context) error {
				if now := served(pod); now == "" || now == old {
					return errors.New("the proxy has the one of before")
				}
				return nil
			})
		}
	}
	rotated("under way")
	check(t, s.EndProgram(t.Context(), "meshca-agent"))
	time.Sleep(2 * time.Second) // away, with traffic
	check(t, s.StartProgram(t.Context(), "meshca-agent"))
	s.eventually(t, "the agent to have its own SVID again", func(context.Context) error {
		if w := s.held(t, client); w.GetState() != "fresh" || w.GetOpenStreams() == 0 {
			return fmt.Errorf("%v", w)
		}
		return nil
	})
	rotated("after the agent's restart")
	end()
	traffic.Wait()
	t.Logf("%d requests, each with a handshake of its own", calls)
	for _, pod := range []*corev1.Pod{server, client} {
		s.runs(t, pod)
		s.delete(t, pod)
	}
}

// serialOf reads Envoy's /certs.
func serialOf(answer, id string) string {
	var certs struct {
		Certificates []struct {
			Chain []struct {
				Serial string `json:"serial_number"`
				Names  []struct {
					URI string `json:"uri"`
				} `json:"subject_alt_names"`
			} `json:"cert_chain"`
		} `json:"certificates"`
	}
	if json.Unmarshal([]byte(answer), &certs) != nil {
		return ""
	}
	for _, c := range certs.Certificates {
		if len(c.Chain) > 0 && len(c.Chain[0].Names) > 0 && c.Chain[0].Names[0].URI == id {
			return c.Chain[0].Serial
		}
	}
	return ""
}

// sidecar is a pod with an Envoy that has the volume. Its first container is what tests have done in a pod.
func sidecar(name, config string) *corev1.Pod {
	pod := identified(podOf(namespace, name))
	envoy := pod.Spec.Containers[0]
	envoy.Name, envoy.Image = "envoy", "localhost/envoy:test"
	envoy.Command = []string{"/envoy", "--config-yaml", config, "--concurrency", "1", "--log-level", "warning", "--use-dynamic-base-id"}
	pod.Spec.Containers = []corev1.Container{
		{Name: "c", Image: "localhost/inpod:test", ImagePullPolicy: corev1.PullNever, Command: []string{"/inpod", "pause"}}, envoy,
	}
	return pod
}

const (
	toAgent = `
  - name: sds
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: sds, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: ` + socket + `}}}}]}]}
`
	// tlsContext is both sides': who we are, and whom we accept.
	tlsContext = `
          common_tls_context:
            tls_params: {tls_maximum_protocol_version: TLSv1_3}
            tls_certificate_sds_secret_configs:
            - name: default
              sds_config: &sds
                resource_api_version: V3
                api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: sds}}]}
            combined_validation_context:
              default_validation_context: {match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: "PEER"}}]}
              validation_context_sds_secret_config: {name: ROOTCA, sds_config: *sds}
`
	httpManager = `
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: requests
          forward_client_cert_details: SANITIZE
          http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, ROUTE}]}]}
`
	envoyHead = `
node: {id: pod, cluster: mesh}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 9901}}}
static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: ADDRESS}}
    filter_chains:
`
)

// serverConfig answers whoever has this ID, with the ID.
func serverConfig(peer string) string {
	return strings.NewReplacer("ADDRESS", "0.0.0.0, port_value: 8443", "PEER", peer,
		"ROUTE", `direct_response: {status: 200, body_format: {text_format_source: {inline_string: "%DOWNSTREAM_PEER_URI_SAN%"}}}`).Replace(envoyHead + `
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          disable_stateless_session_resumption: true
          disable_stateful_session_resumption: true` + tlsContext + `      filters:` + httpManager + `  clusters:` + toAgent)
}

// clientConfig takes plain HTTP on loopback to a server of this ID.
func clientConfig(address, peer string) string {
	return strings.NewReplacer("ADDRESS", "127.0.0.1, port_value: 8080", "PEER", peer, "ROUTE", "route: {cluster: server, timeout: 20s}", "SERVER", address).Replace(envoyHead + `
    - filters:` + httpManager + `  clusters:
  - name: server
    type: STATIC
    connect_timeout: 10s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http_protocol_options: {}}
        common_http_protocol_options: {max_requests_per_connection: 1}
    load_assignment: {cluster_name: server, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: SERVER, port_value: 8443}}}}]}]}
    transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
          max_session_keys: 0` + tlsContext + toAgent)
}
