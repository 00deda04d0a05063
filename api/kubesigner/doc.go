// Package kubesigner makes the CA a signer of a Kubernetes cluster, so that pods have identities without any agent, and
// publishes the trust bundle there.
//
//   - [Signer] is the door: PodCertificateRequests, which kubelets make for podCertificate volumes, and
//     CertificateSigningRequests, which pods make themselves. Each ends in the same call of ca/registration as every other
//     request.
//   - [Publisher] keeps ClusterTrustBundles and ConfigMaps equal to the trust bundle, and tells since when they are, so that
//     a new root signs for nobody before its readers can have it.
//
// Requests are looked at one by one as they are at that moment; nothing of them is kept but their names. What a kubelet
// takes as final (Denied) is only ever answered where the same request could never be granted: a fault that passes leaves
// the request open, and it is tried again.
//
// Several replicas may serve one cluster. Before anything is signed for a request, one of them writes its name on it, on
// the condition that nobody changed the object since it was read; the others leave it alone. A replica that dies between
// that and the answer is succeeded after half a minute. So one certificate at most is ever delivered, and a second one is
// signed only where the first signer was broken off; the ledger's entries of the two name the same object.
package kubesigner
