package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// thief speaks to the CA from wherever it is, with what it stole.
type thief struct {
	site *site
	key  *ecdsa.PrivateKey
	td   spiffeid.TrustDomain
}

func newThief(s *site) *thief {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(s.t, err)
	return &thief{site: s, key: key, td: spiffeid.RequireTrustDomainFromString("mesh.test")}
}

// door is the CA's, shown an SVID or none.
func (x *thief) door(svid *tls.Certificate) meshcav1.IssuanceServiceClient {
	x.site.t.Helper()
	var bundle struct {
		Keys []struct {
			X5C [][]byte `json:"x5c"`
		} `json:"keys"`
	}
	check(x.site.t, json.Unmarshal([]byte(read(x.site.t, x.site.file("bundle.json"))), &bundle))
	roots := x509bundle.New(x.td)
	for _, k := range bundle.Keys {
		root, err := x509.ParseCertificate(k.X5C[0])
		check(x.site.t, err)
		roots.AddX509Authority(root)
	}
	config := tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(x.td, "/meshca/server")))
	if svid != nil {
		config.Certificates = []tls.Certificate{*svid}
	}
	conn, err := grpc.NewClient(fmt.Sprintf("127.0.0.1:%d", x.site.port), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	check(x.site.t, err)
	x.site.t.Cleanup(func() { _ = conn.Close() })
	return meshcav1.NewIssuanceServiceClient(conn)
}

// csr is for the thief's own key, and asks for a name if one is given.
func (x *thief) csr(id string) []byte {
	x.site.t.Helper()
	template := &x509.CertificateRequest{}
	if id != "" {
		uri, err := url.Parse(id)
		check(x.site.t, err)
		template.URIs = []*url.URL{uri}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, x.key)
	check(x.site.t, err)
	return der
}

// ask is for one SVID; it returns the refusal, of the call or of the request, or what was issued.
func (x *thief) ask(svid *tls.Certificate, cluster string, r *meshcav1.X509SVIDRequest) (string, error) {
	answer, err := x.door(svid).IssueX509SVIDs(x.site.t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: cluster, Requests: []*meshcav1.X509SVIDRequest{r}})
	if err != nil {
		return "", err
	}
	result := answer.GetResults()[0]
	if no := result.GetRefusal(); no != nil {
		return "", refusal.New(refusal.Reason(no.GetReason()), "%s", no.GetMessage())
	}
	leaf, err := x509.ParseCertificate(result.GetSvid().GetChain()[0])
	if err != nil {
		return "", err
	}
	return leaf.URIs[0].String(), nil
}

// attest shows a token as an agent does, for the thief's key.
func (x *thief) attest(token string) (*tls.Certificate, error) {
	r, err := x.door(nil).AttestAgent(x.site.t.Context(), &meshcav1.AttestAgentRequest{Cluster: "one", Token: token, Csr: x.csr("")})
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: r.GetSvid().GetChain(), PrivateKey: x.key}, nil
}

// fromDisk is the SVID of a node's agent, with its key, as it lies in its runtime directory.
func (x *thief) fromDisk(n *agentNode) *tls.Certificate {
	x.site.t.Helper()
	var kept struct {
		Chain [][]byte `json:"chain"`
		Key   []byte   `json:"key"`
	}
	path := filepath.Join(n.dir, "run", "keys", "agent.json")
	check(x.site.t, json.Unmarshal([]byte(read(x.site.t, path)), &kept))
	key, err := x509.ParsePKCS8PrivateKey(kept.Key)
	check(x.site.t, err)
	return &tls.Certificate{Certificate: kept.Chain, PrivateKey: key}
}

// What is stolen from one node is worth nothing elsewhere: neither an agent's token or SVID, nor a pod's token. And a
// token without an agent, or an agent without a token, is worth nothing anywhere.
func TestWhatIsStolenIsWorthNothingElsewhere(t *testing.T) {
	for _, mode := range []string{"tokenReview", "jwks"} {
		t.Run(mode, func(t *testing.T) { steal(t, mode) })
	}
}

func steal(t *testing.T, mode string) {
	s := newSite(t, mode, 5*time.Minute)
	s.startCA()
	one, two := s.node("node1"), s.node("node2")
	web, db := one.workload("web"), two.workload("db")
	one.start()
	two.start()
	one.await("web", "fresh", "")
	two.await("db", "fresh", "")

	x := newThief(s)
	agentToken, webToken, dbToken := read(t, filepath.Join(one.dir, "token")), read(t, filepath.Join(one.dir, "tokens", "web")), read(t, filepath.Join(two.dir, "tokens", "db"))
	stolen, other := x.fromDisk(one), x.fromDisk(two)
	attested, err := x.attest(agentToken)
	check(t, err) // the token is true: it makes whoever has it node1's agent, and nothing more
	const webID = "spiffe://mesh.test/ns/shop/sa/web"
	with := func(token, id string) *meshcav1.X509SVIDRequest {
		return &meshcav1.X509SVIDRequest{Token: token, Csr: x.csr(id)}
	}
	vouched := func(name, uid string) *meshcav1.X509SVIDRequest {
		return &meshcav1.X509SVIDRequest{Pod: &meshcav1.PodReference{Namespace: "shop", Name: name, Uid: uid}, Csr: x.csr("")}
	}
	for name, tt := range map[string]struct {
		svid    *tls.Certificate
		cluster string
		request *meshcav1.X509SVIDRequest
		want    []refusal.Reason
	}{
		"the agent's SVID, for a pod of another node":              {stolen, "one", with(dbToken, ""), []refusal.Reason{refusal.PodNotOnNode}},
		"an SVID for the agent's token, for a pod of another node": {attested, "one", with(dbToken, ""), []refusal.Reason{refusal.PodNotOnNode}},
		"the agent's SVID, naming a pod beside it":                 {stolen, "one", vouched(web.Name, string(web.UID)), []refusal.Reason{refusal.NodeVouchedNotAllowed}},
		"the agent's SVID, naming a pod of another node":           {stolen, "one", vouched(db.Name, string(db.UID)), []refusal.Reason{refusal.NodeVouchedNotAllowed, refusal.PodNotOnNode}},
		"the agent's SVID, in another cluster":                     {stolen, "two", with(webToken, ""), []refusal.Reason{refusal.ClusterUnknown, refusal.ClusterMismatch}},
		"the agent's SVID and its token, as a workload's":          {stolen, "one", with(agentToken, ""), []refusal.Reason{refusal.TokenAudience, refusal.TokenRejected}},
		"the pod's token, at another node's agent":                 {other, "one", with(webToken, ""), []refusal.Reason{refusal.PodNotOnNode}},
		"the pod's token, at its own agent, for another's name":    {stolen, "one", with(webToken, "spiffe://mesh.test/ns/shop/sa/db"), []refusal.Reason{refusal.CSRAsksMore}},
		"the pod's token, at its own agent, for the CA's name":     {stolen, "one", with(webToken, "spiffe://mesh.test/meshca/server"), []refusal.Reason{refusal.CSRAsksMore}},
		"the pod's token, without an agent":                        {nil, "one", with(webToken, ""), []refusal.Reason{refusal.AgentRequired, refusal.DirectNotAllowed}},
	} {
		id, err := x.ask(tt.svid, tt.cluster, tt.request)
		if got := refusal.Of(err); err == nil || !slices.Contains(tt.want, got) {
			t.Errorf("%s: issued %q, %v; want one of %v", name, id, err, tt.want)
		}
	}
	if _, err := x.attest(webToken); !slices.Contains([]refusal.Reason{refusal.TokenAudience, refusal.TokenRejected}, refusal.Of(err)) {
		t.Errorf("the pod's token makes an agent: %v", err)
	}

	// The thief's ways are open where everything fits: all that stood in its way above is what it did not have.
	if id, err := x.ask(stolen, "one", with(webToken, webID)); err != nil || id != webID {
		t.Errorf("all that belongs together was shown: %q, %v", id, err)
	}

	// The agent's pod is replaced, as is done after a theft. What was stolen from it dies with it.
	check(t, s.kube.DeletePod(t.Context(), one.pod, 0))
	eventually(t, "the stolen SVID to be refused", 45*time.Second, func() bool {
		_, err := x.ask(stolen, "one", with(webToken, ""))
		return refusal.Of(err) == refusal.PodGone
	})
	if _, err := x.attest(agentToken); !slices.Contains([]refusal.Reason{refusal.PodGone, refusal.TokenRejected}, refusal.Of(err)) {
		t.Errorf("a dead agent's token: %v", err)
	}
}
