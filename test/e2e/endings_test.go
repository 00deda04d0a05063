package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/figures"
)

const (
	// endAim is within what a stream is to end after the API server's word, and half of them must: a machine that stops for a
	// moment does not hold up so many.
	endAim = 5 * time.Second
	// endLimit is how long is waited for one.
	endLimit = 30 * time.Second
)

// sdsStream is an SDS stream of one workload.
type sdsStream struct {
	t    *testing.T
	conn *grpc.ClientConn
	// ended has why the stream ended, and then is closed.
	ended chan error
	at    time.Time // of the end; read it after ended
}

// connect opens a stream at a workload's socket and waits for its SVID.
func (n *agentNode) connect(name string) *sdsStream {
	t := n.site.t
	t.Helper()
	conn, err := grpc.NewClient("unix:"+n.socket(name), grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(t.Context(), grpc.WaitForReady(true))
	check(t, err)
	const kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	check(t, stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: name}, ResourceNames: []string{"default"}, TypeUrl: kind}))
	p := &sdsStream{t: t, conn: conn, ended: make(chan error, 1)}
	first := make(chan struct{})
	go func() {
		defer close(p.ended)
		for got := false; ; {
			r, err := stream.Recv()
			if err != nil {
				p.at = time.Now()
				p.ended <- err
				return
			}
			if len(r.GetResources()) > 0 && !got {
				got = true
				close(first)
			}
			_ = stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, TypeUrl: kind, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce()})
		}
	}()
	select {
	case <-first:
	case err := <-p.ended:
		t.Fatalf("%s: the stream ended before there was anything: %v", name, err)
	case <-time.After(45 * time.Second):
		t.Fatalf("%s: nothing is served", name)
	}
	return p
}

// end waits for the stream's end with the reason, and returns how long after the word it came.
func (p *sdsStream) end(word time.Time, reasons ...refusal.Reason) time.Duration {
	p.t.Helper()
	select {
	case err := <-p.ended:
		if !slices.Contains(reasons, refusal.Of(err)) {
			p.t.Errorf("the stream ended with %v, want one of %s", err, reasons)
		}
		return p.at.Sub(word)
	case <-time.After(endLimit):
		p.t.Fatalf("the stream is still open %v after the API server's word", endLimit)
	}
	return 0
}

// open fails if the stream has ended.
func (p *sdsStream) open(what string) {
	p.t.Helper()
	select {
	case err := <-p.ended:
		p.t.Errorf("%s: the stream ended with %v", what, err)
	default:
	}
}

// report adds what was measured to the figures, and holds the middle of it to the aim.
func report(t *testing.T, what string, took []time.Duration, aim time.Duration) *figures.Sheet {
	t.Helper()
	slices.Sort(took)
	middle, sheet := took[len(took)/2], figures.For(t)
	sheet.Add("%s, until the stream ended: n=%d p50 %v max %v", what, len(took), middle.Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	if middle > aim {
		t.Errorf("%s: it took %v and more for half of the streams to end, and is to take %v at most", what, middle, aim)
	}
	return sheet
}

// holds makes pods of a service account on the node, each with a socket of its own.
func (n *agentNode) holds(namespace, account string, count int) []*corev1.Pod {
	t := n.site.t
	t.Helper()
	pods := make([]*corev1.Pod, count)
	for i := range count {
		pod, err := n.site.kube.CreatePod(t.Context(), namespace, fmt.Sprintf("%s-%d", account, i), account, n.name)
		check(t, err)
		n.serve(namespace+"-"+pod.Name, n.site.token(pod, "meshca"))
		pods[i] = pod
	}
	return pods
}

func (n *agentNode) connectAll(pods []*corev1.Pod) []*sdsStream {
	n.site.t.Helper()
	var all []*sdsStream
	for _, pod := range pods {
		all = append(all, n.connect(pod.Namespace+"-"+pod.Name))
	}
	return all
}

func (s *site) accounts(namespace string, names ...string) {
	s.t.Helper()
	if _, err := s.kube.CreateNamespace(s.t.Context(), namespace); err != nil && !strings.Contains(err.Error(), "already exists") {
		s.t.Fatal(err)
	}
	for _, name := range names {
		_, err := s.kube.CreateServiceAccount(s.t.Context(), namespace, name)
		check(s.t, err)
	}
}

// An identity dies with its cause: within seconds of the API server's word the agent has dropped it and closed its streams,
// in both modes, and nothing else.
func TestIdentitiesDieWithTheirCause(t *testing.T) {
	for _, mode := range []string{"tokenReview", "jwks"} {
		t.Run(mode, func(t *testing.T) { die(t, mode) })
	}
}

func die(t *testing.T, mode string) {
	const each = 8
	s := newSite(t, mode, time.Hour) // no renewal comes in between
	s.policy("rules: [{}]")
	s.startCA()
	s.accounts("shop", "pods", "gone", "anew", "slow")
	s.accounts("bank", "teller")
	core, ctx := s.kube.Clientset.CoreV1(), t.Context()
	one, two := s.node("node1"), s.node("node2")
	podsGo, gone, anew := one.holds("shop", "pods", each), one.holds("shop", "gone", each), one.holds("shop", "anew", each)
	slow, bank, stay := one.holds("shop", "slow", 1), one.holds("bank", "teller", each), one.holds("shop", "web", 2)
	rooted := two.holds("shop", "db", each)
	one.start()
	two.start()
	kept := one.connectAll(stay)
	terminating := one.connectAll(slow)[0]

	t.Run("pod deleted", func(t *testing.T) {
		var took []time.Duration
		for i, p := range one.connectAll(podsGo) {
			time.Sleep(rand.N(time.Second)) // the CA looks once a second
			check(t, s.kube.DeletePod(ctx, podsGo[i], 0))
			took = append(took, p.end(time.Now(), refusal.PodGone, refusal.PodFinished)) // its last moments may be seen, too
		}
		report(t, mode+": pod deleted", took, endAim)
	})
	// It still serves, and renews if it must.
	check(t, s.kube.DeletePod(ctx, slow[0], 10*time.Minute))
	ends := func(what string, proxies []*sdsStream, reason refusal.Reason, do func() error) {
		t.Run(what, func(t *testing.T) {
			time.Sleep(rand.N(time.Second))
			check(t, do())
			word := time.Now()
			var took []time.Duration
			for _, p := range proxies {
				took = append(took, p.end(word, reason))
			}
			report(t, mode+": "+what, took, endAim)
		})
	}
	ends("service account deleted", one.connectAll(gone), refusal.ServiceAccountGone, func() error {
		return core.ServiceAccounts("shop").Delete(ctx, "gone", metav1.DeleteOptions{})
	})
	streams := one.connectAll(anew)
	ends("service account made anew", streams, refusal.ServiceAccountGone, func() error {
		if err := core.ServiceAccounts("shop").Delete(ctx, "anew", metav1.DeleteOptions{}); err != nil {
			return err
		}
		_, err := s.kube.CreateServiceAccount(ctx, "shop", "anew")
		return err
	})
	ends("namespace terminating", one.connectAll(bank), refusal.NamespaceGone, func() error {
		return core.Namespaces().Delete(ctx, "bank", metav1.DeleteOptions{})
	})
	ends("node deleted", two.connectAll(rooted), refusal.NodeGone, func() error {
		return core.Nodes().Delete(ctx, "node2", metav1.DeleteOptions{})
	})

	// A renewal is refused at once, for the reason; and the next token at the same socket, of the new account, is as good as any.
	one.await("shop-gone-0", "refused", "SERVICE_ACCOUNT_GONE")
	s.write(filepath.Join("node1", "tokens", "shop-anew-0"), s.token(anew[0], "meshca"))
	one.await("shop-anew-0", "fresh", "")
	one.connect("shop-anew-0").open("the account's second life")

	// The terminating pod serves on, and renews.
	if out, code := s.certctl("--socket", s.file("admin.sock"), "svid", "renew", "spiffe://mesh.test/ns/shop/sa/slow", "--spread", "0s"); code != 0 {
		t.Fatalf("svid renew: exit %d\n%s", code, out)
	}
	eventually(t, "the terminating pod's renewal", 30*time.Second, func() bool {
		out, _ := s.certctl("--socket", s.file("admin.sock"), "explain", "pod", "shop/slow-0", "-o", "json")
		return strings.Count(out, `"outcome": "issued"`) == 2
	})
	terminating.open("a pod that terminates")
	for _, p := range kept {
		p.open("a pod that nothing happened to")
	}
	s.audited(map[string]int{"POD_GONE|POD_FINISHED": each, "SERVICE_ACCOUNT_GONE": 2 * each, "NAMESPACE_GONE": each, "NODE_GONE": each})
	if out, code := s.certctl("--socket", s.file("admin.sock"), "explain", "pod", "shop/pods-0", "-o", "json"); code != 0 || !strings.Contains(out, `"event": "end"`) {
		t.Errorf("certctl explain (exit %d):\n%s", code, out)
	}
	s.dropped(one, stay, kept)
	if err := two.agent.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the agent whose node went has ended: %v", err)
	}
}

// audited waits until the audit log has so many lines of ends, by their reason.
func (s *site) audited(want map[string]int) {
	s.t.Helper()
	for reasons, n := range want {
		line := regexp.MustCompile(`"msg":"end","outcome":"(` + reasons + `)"`)
		eventually(s.t, fmt.Sprintf("%d audit lines of %s", n, reasons), 20*time.Second, func() bool {
			return len(line.FindAllString(read(s.t, s.file("audit.log")), -1)) == n
		})
	}
}

// dropped measures what ends what is held and the streams that had it, while the proxy stays: an operator's word, and
// policy's. The proxy comes back for the trust bundle.
func (s *site) dropped(n *agentNode, pods []*corev1.Pod, proxies []*sdsStream) {
	const id = "spiffe://mesh.test/ns/shop/sa/web"
	for _, c := range []struct {
		what, state, reason string
		do                  func()
	}{
		{"identity denied", "denied", "IDENTITY_DENIED", func() {
			if out, code := s.certctl("--socket", s.file("admin.sock"), "svid", "deny", id, "--why", "a test"); code != 0 {
				s.t.Fatalf("svid deny: exit %d\n%s", code, out)
			}
		}},
		{"identity allowed", "fresh", "", func() {
			if out, code := s.certctl("--socket", s.file("admin.sock"), "svid", "allow", id); code != 0 {
				s.t.Fatalf("svid allow: exit %d\n%s", code, out)
			}
		}},
		{"policy changed", "refused", "POLICY_DENIED", func() { s.policy("rules: [{serviceAccounts: [web], deny: closed}, {}]") }},
	} {
		c.do()
		word := time.Now()
		if c.reason == "" {
			n.await("shop-web-0", c.state, c.reason)
			n.await("shop-web-1", c.state, c.reason)
			proxies = n.connectAll(pods)
			continue
		}
		var took []time.Duration
		for _, p := range proxies {
			took = append(took, p.end(word, refusal.Reason(c.reason)))
		}
		report(s.t, s.mode+": "+c.what, took, endAim)
		n.await("shop-web-0", c.state, c.reason)
		n.await("shop-web-1", c.state, c.reason)
	}
	n.trusts("shop-web-0")
}

// trusts fails unless a proxy that comes back to a workload's socket gets the trust bundle.
func (n *agentNode) trusts(name string) {
	t := n.site.t
	t.Helper()
	conn, err := grpc.NewClient("unix:"+n.socket(name), grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), endLimit)
	defer cancel()
	got, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{
		Node: &corev3.Node{Id: name}, ResourceNames: []string{"default", "ROOTCA"}, TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
	})
	check(t, err)
	if len(got.GetResources()) != 1 {
		t.Errorf("who comes back to %s has %d secrets, want the trust bundle alone", name, len(got.GetResources()))
	}
}

// policy puts rules in the place of those before.
func (s *site) policy(rules string) {
	s.t.Helper()
	const line = "policyFile: "
	config := read(s.t, s.file("ca.yaml"))
	if !strings.Contains(config, line) {
		s.write("ca.yaml", config+line+s.file("policy.yaml")+"\n")
	}
	s.write("policy.yaml.new", rules)
	check(s.t, os.Rename(s.file("policy.yaml.new"), s.file("policy.yaml")))
}

// What ends while the CA or the agent is away is heard of when it is back; what does not end lives on through all of it, and
// through an API server that goes away and comes back.
func TestEndsThatNobodySaw(t *testing.T) {
	s := newSite(t, "tokenReview", time.Hour)
	s.startCA()
	s.accounts("shop", "a", "b", "c")
	one := s.node("node1")
	a, b, c := one.holds("shop", "a", 1), one.holds("shop", "b", 1), one.holds("shop", "c", 1)
	one.start()
	first, stays := one.connectAll(a)[0], one.connectAll(c)[0]
	one.connectAll(b)

	s.stopCA()
	check(t, s.kube.DeletePod(t.Context(), a[0], 0))
	first.open("with the CA away")
	s.startCA()
	report(t, "pod deleted while the CA was away", []time.Duration{first.end(time.Now(), refusal.PodGone)}, endLimit)

	s.kube.Stop()
	time.Sleep(8 * time.Second) // some looks, and as many watches that fail
	stays.open("with the API server away")
	check(t, s.kube.StartAgain(t.Context()))
	time.Sleep(3 * time.Second)
	stays.open("with the API server back")
	one.stop()
	check(t, s.kube.DeletePod(t.Context(), b[0], 0))
	eventually(t, "the CA knows", endLimit, func() bool {
		return strings.Contains(read(t, s.file("audit.log")), `"pod":"b-0","podUID":"`+string(b[0].UID)+`","node":"node1"`)
	})
	one.start()
	one.await("shop-b-0", "refused", "POD_GONE")
	one.await("shop-c-0", "fresh", "")
	one.connect("shop-c-0").open("through all of it")
}

// A namespace of many pods goes at once, and who is not in it is served as ever.
func TestANamespaceOfManyGoes(t *testing.T) {
	const many = 1000
	s := newSite(t, "jwks", time.Hour)
	s.startCA()
	s.accounts("crowd", "all")
	s.accounts("shop", "other")
	one, two := s.node("node1"), s.node("node2")
	pods := one.holds("crowd", "all", many)
	others := two.holds("shop", "other", 20)
	one.start()
	proxies := one.connectAll(pods)
	check(t, s.kube.Clientset.CoreV1().Namespaces().Delete(t.Context(), "crowd", metav1.DeleteOptions{}))
	word := time.Now()
	two.start() // twenty first SVIDs, in the midst of it
	var wg sync.WaitGroup
	var served time.Duration
	wg.Go(func() {
		two.connectAll(others)
		served = time.Since(word)
	})
	var took []time.Duration
	for _, p := range proxies {
		took = append(took, p.end(word, refusal.NamespaceGone))
	}
	wg.Wait()
	sheet := report(t, "namespace of 1000 deleted", took, endLimit)
	sheet.Add("%d others had their first SVIDs %v after that, the start of their agent included", len(others), served.Round(time.Millisecond))
	s.audited(map[string]int{"NAMESPACE_GONE": many})
}
