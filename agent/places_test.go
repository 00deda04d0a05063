package agent

import (
	"bytes"
	"context"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/refusal"
)

// ask fetches at a socket, within a time.
func ask(t *testing.T, socket string, within time.Duration) error {
	t.Helper()
	conn := dial(t, socket)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	_, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx,
		&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "test"}, ResourceNames: []string{"ROOTCA"}}, grpc.WaitForReady(true))
	return err
}

// However many sockets a pod has, it costs what one may.
func TestSocketsOfAPodShareItsBounds(t *testing.T) {
	n := newNode(t)
	n.config.ConnectionsPerPod, n.config.StreamsPerPod = 2, 1
	n.workload("fixed")
	p := newPods(n)
	n.start()
	one, _ := n.pod("one")
	two, _ := n.pod("two")
	other, _ := n.pod("other")
	one.Pod, two.Pod, other.Pod = Pod{"shop", "web", "uid-1"}, Pod{"shop", "web", "uid-1"}, Pod{"shop", "db", "uid-2"}
	shared := Workload{Socket: n.path("shared.sock#uid-1"), PodUID: "uid-1"}
	n.ca.Pod("uid-1", "/ns/test/sa/web")
	p.in(func(a *Agent) {
		for _, w := range []Workload{one, two, other, shared} {
			k, err := a.Add(w)
			must(t, err)
			must(t, k.Ready(t.Context()))
		}
	})
	for _, w := range []Workload{one, two, other} {
		must(t, ask(t, w.Socket, 30*time.Second))
	}

	conn := dial(t, one.Socket)
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(t.Context(), grpc.WaitForReady(true))
	must(t, err)
	must(t, stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "test"}, ResourceNames: []string{"ROOTCA"}}))
	_, err = stream.Recv()
	must(t, err)
	if err := ask(t, two.Socket, 30*time.Second); refusal.Of(err) != refusal.PeerLimit || !strings.Contains(err.Error(), "sds.streamsPerPod") {
		t.Errorf("one stream too many: %v", err)
	}
	p.in(func(a *Agent) {
		limited := map[string]string{}
		for _, w := range a.roster.list() {
			limited[w.Socket] = w.shown().GetLastLimit()
		}
		if !strings.Contains(limited[two.Socket], "sds.streamsPerPod") || limited[other.Socket] != "" {
			t.Errorf("the limits that were met are shown as %q", limited)
		}
		text := &bytes.Buffer{}
		families, err := a.metrics.registry.Gather()
		must(t, err)
		for _, f := range families {
			text.WriteString(f.String() + "\n")
		}
		if !regexp.MustCompile(`meshca_agent_sds_refused_total.*value:1\b`).MatchString(text.String()) {
			t.Error("it is not counted")
		}
	})
	if log := n.log.String(); !regexp.MustCompile(`an SDS stream or fetch was refused.*pod=shop/web.*sds\.streamsPerPod`).MatchString(log) {
		t.Error("it is not logged with its pod")
	}
	must(t, ask(t, other.Socket, 30*time.Second))
	must(t, ask(t, n.path("fixed.sock"), 30*time.Second))

	second := dial(t, two.Socket)
	defer second.Close()
	idle, err := secretv3.NewSecretDiscoveryServiceClient(second).StreamSecrets(t.Context(), grpc.WaitForReady(true))
	must(t, err)
	if _, err := idle.Recv(); refusal.Of(err) != refusal.PeerLimit { // its connection stays
		t.Errorf("one stream too many: %v", err)
	}
	if err := ask(t, two.Socket, 300*time.Millisecond); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("one connection too many: %v", err)
	}
	p.in(func(a *Agent) {
		near, far := net.Pipe()
		defer near.Close()
		if err := a.Find(shared.Socket).Serve(far); refusal.Of(err) != refusal.PeerLimit {
			t.Errorf("one connection too many at the shared socket: %v", err)
		}
	})
	must(t, ask(t, other.Socket, 30*time.Second))
	must(t, conn.Close())
	eventually(t, "the place and the stream of the one that was closed go to another", func() bool { // the agent hears of it a moment later
		err := ask(t, two.Socket, 30*time.Second)
		if err != nil && refusal.Of(err) != refusal.PeerLimit {
			t.Fatal(err)
		}
		return err == nil
	})
}

// These are the numbers that api/sds TestWhatANodesPodsCanHold adds up.
func TestBoundsOfAPod(t *testing.T) {
	c := Config{}.withDefaults()
	if got := c.account(Workload{PodUID: "u"}); got != (account{"u", 16, 24, "sds.streamsPerPod"}) {
		t.Errorf("of a pod: %+v", got)
	}
	if got := c.account(Workload{Socket: "/s"}); got != (account{"/s", 32, 0, "sds.streamsPerSocket"}) {
		t.Errorf("of a socket: %+v", got)
	}
}
