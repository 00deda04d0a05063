package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// proxy is an SDS client that asks for roots, and takes them when it is told to.
type proxy struct {
	t      *testing.T
	socket string
	stream grpc.BidiStreamingClient[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
	// roots is how many it trusts; they stay when the stream breaks, as a proxy's do.
	roots int
}

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// connect opens a stream and asks.
func (p *proxy) connect() {
	p.t.Helper()
	conn, err := grpc.NewClient("unix:"+p.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(p.t, err)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.t.Context()), 3*limit)
	p.t.Cleanup(func() { cancel(); _ = conn.Close() })
	p.stream, err = secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	check(p.t, err)
	p.say(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "proxy"}})
}

func (p *proxy) say(r *discoveryv3.DiscoveryRequest) {
	p.t.Helper()
	r.TypeUrl, r.ResourceNames = secretType, []string{"ROOTCA"}
	check(p.t, p.stream.Send(r))
}

// sent is the next answer.
func (p *proxy) sent() *discoveryv3.DiscoveryResponse {
	p.t.Helper()
	r, err := p.stream.Recv()
	check(p.t, err)
	return r
}

// take trusts what an answer holds, and says so.
func (p *proxy) take(r *discoveryv3.DiscoveryResponse) {
	p.t.Helper()
	secret := &tlsv3.Secret{}
	check(p.t, r.GetResources()[0].UnmarshalTo(secret))
	validator := &tlsv3.SPIFFECertValidatorConfig{}
	check(p.t, secret.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(validator))
	p.roots = strings.Count(string(validator.GetTrustDomains()[0].GetTrustBundle().GetInlineBytes()), "BEGIN CERTIFICATE")
	p.say(&discoveryv3.DiscoveryRequest{VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce()})
}

// standing is what `certctl ca status` says of the rollout and of the only agent.
type standing struct {
	Rollout struct {
		Step           string
		BundleSequence uint64 `json:",string"`
		Waits          []string
	}
	Agents []struct {
		AckedBundleSequence uint64 `json:",string"`
		Connected           bool
		Rejections          []string
	}
}

func (s *site) standing() (st standing) {
	s.t.Helper()
	check(s.t, json.Unmarshal([]byte(s.order("ca", "status", "-o", "json")), &st))
	if len(st.Agents) != 1 {
		s.t.Fatalf("%d agents count", len(st.Agents))
	}
	return st
}

// held wants the rollout to wait for the agent still. An agent that has waited for as long as it ever does, because this
// machine is that slow, proves nothing.
func (s *site) held(p *proxy) {
	s.t.Helper()
	st := s.standing()
	if st.Rollout.Step == "published" && slices.Contains(st.Rollout.Waits, "spiffe://mesh.test/meshca/agent/one/node1") && st.Agents[0].AckedBundleSequence < st.Rollout.BundleSequence {
		return
	}
	if strings.Contains(s.agent.Output(), "trust bundles wait for them no longer") {
		s.t.Skip("the machine is too slow: the agent's wait was over before the proxy came")
	}
	s.t.Fatalf("a proxy trusts %d roots, and the CA goes on: %+v", p.roots, st)
}

// An agent is killed amid a rollout, and comes back before its proxies do: nobody has confirmed the new root then.
func TestAKilledAgentConfirmsNothingForProxiesThatAreAway(t *testing.T) {
	s := newSite(t)
	s.write("ca.yaml", strings.Replace(string(read(t, s.file("ca.yaml"))), "ttl: 10s", "ttl: 1h", 1)) // the agent counts all the while
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "") // nobody ever connects to it
	p := &proxy{t: t, socket: s.file("web.sock")}
	p.connect()
	p.take(p.sent())
	s.until("the first bundle is confirmed", func() error {
		if st := s.standing(); st.Agents[0].AckedBundleSequence != s.first || len(st.Agents[0].Rejections) > 0 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})

	s.agent.Kill()
	s.order("ca", "rotate", "root")
	s.until("the new root is published", func() error {
		if st := s.standing(); st.Rollout.Step != "published" || len(st.Rollout.Waits) == 0 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	s.startAgent()
	s.bundle(2)
	s.until("the CA is told whom the agent waits for", func() error {
		s.held(p)
		if st := s.standing(); len(st.Agents[0].Rejections) != 1 ||
			!strings.Contains(st.Agents[0].Rejections[0], s.file("web.sock")+": 1 of the 1 streams that it had before the agent's restart") {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if out := s.must("certctl", "--agent="+s.file("run/admin.sock"), "status"); strings.Count(out, "0, 1 to come back") != 1 {
		t.Errorf("the agent shows\n%s", out)
	}

	p.connect()
	r := p.sent()
	s.held(p)
	p.take(r)
	if p.roots != 2 {
		t.Errorf("the proxy trusts %d roots", p.roots)
	}
	s.until("the rollout goes on", func() error {
		if st := s.standing(); st.Rollout.Step == "published" {
			return errors.New("it waits still")
		}
		return nil
	})
}
