package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
)

// A fault of ours in one call is that call's alone.
func TestPanicsAreRefused(t *testing.T) {
	log := &logBook{}
	a := &Agent{config: Config{}.withDefaults(), log: slog.New(slog.NewTextHandler(log, nil))} // it lacks all that calls need
	var err error
	a.sds, err = sds.New(sds.Config{Source: func(context.Context) (sds.Source, error) { panic("a-token-in-a-panic") }})
	must(t, err)
	dir := shortDir(t)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()

	l, err := listen(dir+"/admin", 0o600, nil, nil)
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- a.serveAdmin(ctx, l) }()
	conn := dial(t, dir+"/admin")
	defer conn.Close()
	if _, err := meshcav1.NewAgentAdminServiceClient(conn).GetAgentStatus(ctx, &meshcav1.GetAgentStatusRequest{}); refusal.Of(err) != refusal.Internal {
		t.Errorf("admin: %v", err)
	}

	transport := a.newSDSTransport()
	s, err := listen(dir+"/sds", 0o600, nil, nil)
	must(t, err)
	go func() { _ = transport.Serve(s) }()
	defer transport.Stop()
	proxies := dial(t, dir+"/sds")
	defer proxies.Close()
	client := secretv3.NewSecretDiscoveryServiceClient(proxies)
	request := &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "proxy"}, ResourceNames: []string{"default"}, TypeUrl: secretType}
	limited, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := client.FetchSecrets(limited, request); refusal.Of(err) != refusal.Internal {
		t.Errorf("unary: %v", err)
	}
	stream, err := client.StreamSecrets(limited)
	must(t, err)
	if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) { // refused before its first word: Recv says why
		t.Fatal(err)
	}
	if _, err := stream.Recv(); refusal.Of(err) != refusal.Internal {
		t.Errorf("stream: %v", err)
	}
	if !contains(log.String(), "guard.go") {
		t.Errorf("the log has no stack: %s", log)
	}
	if contains(log.String(), "a-token-in-a-panic") {
		t.Errorf("the log has what a call panicked with: %s", log)
	}
	stop()
	must(t, <-served)
}
