package files

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	xdscreds "google.golang.org/grpc/credentials/xds"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/xds"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// controlPlane answers each xDS subscription with what it has, once: nothing changes but the files.
type controlPlane struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	resources map[string][]proto.Message // by type URL
}

func (c *controlPlane) StreamAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	sent := map[string]string{}
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		if r.GetErrorDetail() != nil {
			return fmt.Errorf("gRPC refused %s: %s", r.GetTypeUrl(), r.GetErrorDetail().GetMessage())
		}
		if names := strings.Join(r.GetResourceNames(), " "); r.GetResponseNonce() != "" && sent[r.GetTypeUrl()] == names {
			continue // it was taken
		} else {
			sent[r.GetTypeUrl()] = names
		}
		answer := &discoveryv3.DiscoveryResponse{VersionInfo: "1", TypeUrl: r.GetTypeUrl(), Nonce: "1"}
		for _, m := range c.resources[r.GetTypeUrl()] {
			packed, err := anypb.New(m)
			if err != nil {
				return err
			}
			answer.Resources = append(answer.Resources, packed)
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
	}
}

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	packed, err := anypb.New(m)
	check(t, err)
	return packed
}

// commonTLS names the files by the provider of the bootstrap; id is whom the other side must be.
func commonTLS(id string) *tlsv3.CommonTlsContext {
	validation := &tlsv3.CertificateValidationContext{
		CaCertificateProviderInstance: &tlsv3.CertificateProviderPluginInstance{InstanceName: "meshca"},
	}
	if id != "" {
		validation.MatchSubjectAltNames = []*matcherv3.StringMatcher{{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: id}}} //nolint:staticcheck // the field that gRPC reads (gRFC A29)
	}
	return &tlsv3.CommonTlsContext{
		TlsCertificateProviderInstance: &tlsv3.CertificateProviderPluginInstance{InstanceName: "meshca"},
		ValidationContextType:          &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: validation},
	}
}

func connectionManager(t *testing.T, route *routev3.Route) *hcmv3.HttpConnectionManager {
	return &hcmv3.HttpConnectionManager{
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			Name: "all", VirtualHosts: []*routev3.VirtualHost{{Name: "all", Domains: []string{"*"}, Routes: []*routev3.Route{route}}},
		}},
		HttpFilters: []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(t, &routerv3.Router{})}}},
	}
}

// plan is a mesh of one server at the address: mTLS with the files, on both sides.
func plan(t *testing.T, address *net.TCPAddr, id string) *controlPlane {
	t.Helper()
	everything := &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: ""}}
	at := &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: address.IP.String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(address.Port)},
	}}}
	client := &listenerv3.Listener{Name: "greeter", ApiListener: &listenerv3.ApiListener{ApiListener: pack(t, connectionManager(t, &routev3.Route{
		Match: everything, Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "greeter"}}},
	}))}}
	server := &listenerv3.Listener{
		Name: "grpc/server?xds.resource.listening_address=" + address.String(), Address: at,
		FilterChains: []*listenerv3.FilterChain{{
			Name: "mtls",
			TransportSocket: &corev3.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(t, &tlsv3.DownstreamTlsContext{
				RequireClientCertificate: wrapperspb.Bool(true), CommonTlsContext: commonTLS(""),
			})}},
			Filters: []*listenerv3.Filter{{Name: "hcm", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(t, connectionManager(t, &routev3.Route{
				Match: everything, Action: &routev3.Route_NonForwardingAction{NonForwardingAction: &routev3.NonForwardingAction{}},
			}))}}},
		}},
	}
	ads := &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
	cluster := &clusterv3.Cluster{
		Name: "greeter", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads, ServiceName: "greeter"},
		TransportSocket: &corev3.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(t, &tlsv3.UpstreamTlsContext{
			CommonTlsContext: commonTLS(id),
		})}},
	}
	endpoints := &endpointv3.ClusterLoadAssignment{ClusterName: "greeter", Endpoints: []*endpointv3.LocalityLbEndpoints{{
		Locality: &corev3.Locality{Zone: "here"}, LoadBalancingWeight: wrapperspb.UInt32(1),
		LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: at}}}},
	}}}
	c := &controlPlane{resources: map[string][]proto.Message{}}
	for _, m := range []proto.Message{client, server, cluster, endpoints} {
		url := "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName())
		c.resources[url] = append(c.resources[url], m)
	}
	return c
}

// bootstrap is the example's, for another workload's directory and with the control plane of here.
func (s *site) bootstrap(account, controlPlane string) []byte {
	s.t.Helper()
	text := strings.NewReplacer("xds.mesh.example:443", controlPlane, s.file("greeter"), s.file(account)).Replace(s.example("grpc-bootstrap.json"))
	if !json.Valid([]byte(text)) {
		s.t.Fatalf("the bootstrap is not JSON: %s", text)
	}
	return []byte(text)
}

// grpcTraffic starts a gRPC server as "greeter", and speaks to it as "web": both have their credentials from files, by
// gRPC's own file_watcher, and what to do with them over xDS. Each request goes over a connection of its own; the
// provider behind them is one and the same for the whole test, kept by a connection that stays.
func (s *site) grpcTraffic() *traffic {
	t := s.t
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	address, ok := listener.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("%T", listener.Addr())
	}
	plane, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	control := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(control, plan(t, address, "spiffe://mesh.test/ns/shop/sa/greeter"))
	go func() { _ = control.Serve(plane) }()
	t.Cleanup(control.Stop)

	// gRPC wants credentials to fall back to; a connection that came by them fails serialOf, on both sides.
	fallback := insecure.NewCredentials()
	serverCreds, err := xdscreds.NewServerCredentials(xdscreds.ServerOptions{FallbackCreds: fallback})
	check(t, err)
	server, err := xds.NewGRPCServer(grpc.Creds(serverCreds), grpc.UnaryInterceptor(tellSerial), xds.BootstrapContentsForTesting(s.bootstrap("greeter", plane.Addr().String())))
	check(t, err)
	healthv1.RegisterHealthServer(server, health.NewServer())
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)

	builder, err := xds.NewXDSResolverWithConfigForTesting(s.bootstrap("web", plane.Addr().String()))
	check(t, err)
	connect := func() *grpc.ClientConn { return connectXDS(t, builder) }
	stays := connect()
	t.Cleanup(func() { _ = stays.Close() })
	once := func(ctx context.Context, conn *grpc.ClientConn) (server, client string, err error) {
		var from peer.Peer
		var header metadata.MD
		if _, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{}, grpc.Peer(&from), grpc.Header(&header)); err != nil {
			return "", "", err
		}
		server, err = serialOf(&from)
		return server, strings.Join(header.Get(serialHeader), " "), err
	}
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	for _, _, err = once(ctx, stays); err != nil; _, _, err = once(ctx, stays) { // the server learns of its listener over xDS, too
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return newTraffic("gRPC", func(ctx context.Context) (string, string, error) {
		conn := connect()
		defer conn.Close()
		return once(ctx, conn)
	})
}

// serialHeader is where the server says which certificate the client came with.
const serialHeader = "client-serial"

func tellSerial(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	from, _ := peer.FromContext(ctx)
	serial, err := serialOf(from)
	if err != nil {
		return nil, err
	}
	if err := grpc.SetHeader(ctx, metadata.Pairs(serialHeader, serial)); err != nil {
		return nil, err
	}
	return handle(ctx, request)
}

// serialOf is the serial of the certificate that the other side showed.
func serialOf(from *peer.Peer) (string, error) {
	info, ok := from.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return "", errors.New("the other side showed no certificate")
	}
	return info.State.PeerCertificates[0].SerialNumber.Text(16), nil
}

func connectXDS(t *testing.T, builder resolver.Builder) *grpc.ClientConn {
	creds, err := xdscreds.NewClientCredentials(xdscreds.ClientOptions{FallbackCreds: insecure.NewCredentials()})
	if err != nil {
		t.Error(err)
	}
	conn, err := grpc.NewClient("xds:///greeter", grpc.WithResolvers(builder), grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Error(err)
	}
	return conn
}
